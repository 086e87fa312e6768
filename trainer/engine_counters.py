"""DeepSpeed's counters, learning rates and loss scale, as plain values and back.

They do not depend on the number of ranks or the ZeRO stage, except for the count of micro-batches,
which follows from the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of both of DeepSpeed's loss scalers; each has some of them.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_counters(engine: Any) -> dict[str, Any]:
    """The counters of a DeepSpeed engine between two steps."""
    scaler = _scaler(engine)
    return {
        "global_steps": int(engine.global_steps),
        "skipped_steps": int(engine.skipped_steps),
        "loss_scale": {
            name: float(getattr(scaler, name))
            for name in _SCALE
            if getattr(scaler, name, None) is not None
        },
    }


def set_counters(engine: Any, counters: Mapping[str, Any]) -> None:
    """Put a DeepSpeed engine where `read_counters` found one, whatever its number of ranks."""
    engine.global_steps = counters["global_steps"]
    engine.skipped_steps = counters["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    _set_learning_rates(engine.lr_scheduler, engine.global_steps - engine.skipped_steps)
    scaler = _scaler(engine)
    for name, value in counters["loss_scale"].items():
        known = getattr(scaler, name, None)
        if known is not None:
            setattr(scaler, name, type(known)(value))


def leave_step_out(engine: Any) -> None:
    """What DeepSpeed's wrappers do with a step that is not finite, where nothing is wrapped."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine._step_applied = False


def _scaler(engine: Any) -> Any:
    """What holds the loss scale; None where there is none."""
    wrapper = engine.optimizer
    found = getattr(wrapper, "loss_scaler", None)
    return found if found is not None else getattr(wrapper, "loss_scale_config", None)


def _set_learning_rates(scheduler: Any, steps: int) -> None:
    """Put a `LambdaLR` behind so many steps, its optimizer's rates included."""
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [
        base * factor(steps)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
