"""DeepSpeed's JSON, generated from our settings; a user's own JSON may be merged over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.settings import ConfigError, TrainSettings

_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def deepspeed_config(settings: TrainSettings, *, on_gpu: bool) -> dict[str, Any]:
    """Generate the configuration of `deepspeed.initialize`.

    Args:
        settings: the run's settings.
        on_gpu: whether trainers run on GPUs.

    Raises:
        ConfigError: the user's JSON cannot be read, or sets what the run's own settings decide.
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
    if runtime.deepspeed_config:
        generated = merge_over(generated, _read(runtime.deepspeed_config))
    return generated


def merge_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; the second wins. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_over(below, value) if both and isinstance(below, dict) else value
    return merged


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
    clash = [key for key in _OURS if key in given]
    if clash:
        raise ConfigError(
            f"runtime.deepspeed_config = {path} sets {', '.join(clash)}, which optim.batch_size and "
            "runtime.micro_batch_size decide; remove it there"
        )
    return given
