"""DeepSpeed's JSON, generated from our settings; a user's own JSON may be merged over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.deepspeed_json import check_keys, check_supported
from trainer.settings import ConfigError, TrainSettings
from trainer.settings_runtime import NVME_NEEDS

# What the run's own settings decide: the engine, the schedule and the checkpoints rely on them.
_DECIDED = {
    ("train_batch_size",): "optim.batch_size",
    ("train_micro_batch_size_per_gpu",): "runtime.micro_batch_size",
    ("gradient_accumulation_steps",): "optim.batch_size and runtime.micro_batch_size",
    ("gradient_clipping",): "optim.grad_clip",
    ("optimizer",): "the section optim",
    ("scheduler",): "the section optim",
    ("zero_optimization", "stage"): "runtime.zero_stage",
    ("zero_optimization", "offload_optimizer", "device"): "runtime.offload_optimizer",
    ("zero_optimization", "offload_optimizer", "nvme_path"): "runtime.nvme_path",
    ("zero_optimization", "offload_param", "device"): "runtime.offload_parameters",
    ("zero_optimization", "offload_param", "nvme_path"): "runtime.nvme_path",
    ("zero_allow_untested_optimizer",): "the section optim, whose optimizer is not DeepSpeed's",
    ("zero_force_ds_cpu_optimizer",): "the section optim, whose optimizer is not DeepSpeed's",
    ("bf16", "enabled"): "runtime.precision",
    ("bfloat16", "enabled"): "runtime.precision",
    ("fp16", "enabled"): "runtime.precision",
}


MOST_IN_A_BUCKET = 500_000_000  # gradients that are reduced as one: DeepSpeed's own default


def deepspeed_config(
    settings: TrainSettings, *, on_gpu: bool, parameters: int | None = None
) -> dict[str, Any]:
    """Generate the configuration of `deepspeed.initialize`.

    Args:
        settings: the run's settings.
        on_gpu: whether trainers run on GPUs.
        parameters: of the model. DeepSpeed takes memory for a whole bucket of gradients, however
            few there are; with this, for no more than there are.

    Raises:
        ConfigError: the user's JSON cannot be read, or says otherwise than the run's own settings,
            or asks for what the engine does not do; or the settings need a GPU and there is none.
    """
    runtime = settings.runtime
    generated = _generated(settings, on_gpu=on_gpu)
    if parameters is not None:
        bucket = min(MOST_IN_A_BUCKET, parameters)
        generated["zero_optimization"]["reduce_bucket_size"] = bucket
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(runtime, key) == "nvme" and not on_gpu:
            raise ConfigError(f'runtime.{key} = "nvme": {NVME_NEEDS}')
    if not runtime.deepspeed_config:
        return generated
    file = f"runtime.deepspeed_config = {runtime.deepspeed_config}"
    given = _as_we_say_it(_without_auto(_read(runtime.deepspeed_config)))
    check_keys(given, file)
    conflicts = []
    for keys, decider in _DECIDED.items():
        ours, theirs = _at(generated, keys), _at(given, keys)
        if theirs is not None and theirs != ours:
            here = "not given" if ours is None else json.dumps(ours)
            conflicts.append(
                f"{'.'.join(keys)} = {json.dumps(theirs)} there, {here} here, which {decider} "
                "decides"
            )
    if conflicts:
        raise ConfigError(
            f"{file} contradicts the run's settings: {'; '.join(conflicts)}; remove it there, or "
            "change the setting"
        )
    merged = merge_over(generated, given)
    check_supported(merged, file)
    return merged


def _generated(settings: TrainSettings, *, on_gpu: bool) -> dict[str, Any]:
    runtime, optim = settings.runtime, settings.optim
    zero: dict[str, Any] = {
        "stage": runtime.zero_stage,
        "contiguous_gradients": True,
        # Overlap uses CUDA streams; on the CPU there are none.
        "overlap_comm": on_gpu,
        # A model below this many elements stays whole under stage 3; the default would never
        # partition a small one, so that a test of stage 3 would test nothing.
        "stage3_param_persistence_threshold": 10_000,
    }
    for ours, theirs in _OFFLOADED:
        device = getattr(runtime, ours)
        if device != "none":
            zero[theirs] = {"device": device, "pin_memory": on_gpu}
        if device == "nvme":
            zero[theirs]["nvme_path"] = runtime.nvme_path
    return {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": zero,
        # torch's AdamW and our LAMB, not DeepSpeed's: the same update on CPU and GPU, also where
        # moments are offloaded, and nothing to compile.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # A step whose gradient is not finite is left out in every number format.
        "bf16": {"enabled": runtime.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": runtime.precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


_OFFLOADED = (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param"))


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


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is "auto": it means that whoever reads the file decides."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _as_we_say_it(given: dict[str, Any]) -> dict[str, Any]:
    """The same with one word for each thing: bf16 for bfloat16, and nothing for no offloading."""
    said = dict(given)
    if isinstance(said.get("bfloat16"), dict):
        said["bf16"] = merge_over(said.pop("bfloat16"), said.get("bf16", {}))
    zero = said.get("zero_optimization")
    if isinstance(zero, dict):
        said["zero_optimization"] = {
            key: value
            for key, value in zero.items()
            if not (
                key in ("offload_optimizer", "offload_param")
                and isinstance(value, dict)
                and value.get("device") in ("none",)
                and "nvme_path" not in value
            )
        }
    return said


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
