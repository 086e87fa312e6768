"""DeepSpeed's JSON, generated from our settings; a user's own JSON may be merged over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.settings import ConfigError, TrainSettings

# What the run's own settings decide: the engine, the schedule and the checkpoints rely on them.
_DECIDED = {
    ("train_batch_size",): "optim.batch_size",
    ("train_micro_batch_size_per_gpu",): "runtime.micro_batch_size",
    ("gradient_accumulation_steps",): "optim.batch_size and runtime.micro_batch_size",
    ("gradient_clipping",): "optim.grad_clip",
    ("optimizer",): "the section optim",
    ("scheduler",): "the section optim",
    ("zero_optimization", "stage"): "runtime.zero_stage",
    ("bf16", "enabled"): "runtime.precision",
    ("fp16", "enabled"): "runtime.precision",
}


def deepspeed_config(settings: TrainSettings, *, on_gpu: bool) -> dict[str, Any]:
    """Generate the configuration of `deepspeed.initialize`.

    Args:
        settings: the run's settings.
        on_gpu: whether trainers run on GPUs.

    Raises:
        ConfigError: the user's JSON cannot be read, or says otherwise than the run's own settings.
    """
    runtime, optim = settings.runtime, settings.optim
    generated: dict[str, Any] = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {
            "stage": runtime.zero_stage,
            "contiguous_gradients": True,
            # Overlap uses CUDA streams; on the CPU there are none.
            "overlap_comm": on_gpu,
            # A model below this many elements stays whole under stage 3; the default would never
            # partition a small one, so that a test of stage 3 would test nothing.
            "stage3_param_persistence_threshold": 10_000,
        },
        # torch's AdamW, not DeepSpeed's: the same update on CPU and GPU, nothing to compile.
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": runtime.precision == "bf16"},
        "fp16": {"enabled": runtime.precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if not runtime.deepspeed_config:
        return generated
    given = _read(runtime.deepspeed_config)
    for keys, decider in _DECIDED.items():
        ours, theirs = _at(generated, keys), _at(given, keys)
        if theirs is not None and theirs != ours:
            raise ConfigError(
                f"runtime.deepspeed_config = {runtime.deepspeed_config} sets {'.'.join(keys)} = "
                f"{json.dumps(theirs)}, which {decider} decides; remove it there"
            )
    return merge_over(generated, given)


def merge_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; the second wins. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_over(below, value) if both and isinstance(below, dict) else value
    return merged


def _at(values: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value at a path of keys, or None."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"runtime.deepspeed_config = {path}: cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"runtime.deepspeed_config = {path}: not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"runtime.deepspeed_config = {path}: must hold a JSON object")
    return given
