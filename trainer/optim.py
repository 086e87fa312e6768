"""The optimizer's parameter groups and the learning-rate schedule, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.lamb import Lamb
from trainer.settings import OptimSettings

# `.pooler.` is the entries' and that of each memory layer's query.
_MEMORY_PATH = (
    ".entry_encoder.",
    ".knowledge_attention.",
    ".pooler.",
    ".query_proj.",
    ".query_norm.",
)


def parameter_groups(model: nn.Module, optim: OptimSettings) -> list[dict[str, Any]]:
    """Group parameters by weight decay (matrices only) and learning rate (the memory path's own).

    Returns:
        Non-empty groups for a torch optimizer; every trainable parameter is in exactly one.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            memory = any(part in f".{name}." for part in _MEMORY_PATH)
            groups.setdefault((memory, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr * (optim.memory_lr_scale if memory else 1.0),
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (memory, decays), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups, the same on CPU and GPU.

    LAMB's `set_layouts` must be called where its tensors are not whole parameters.
    """
    groups = parameter_groups(model, optim)
    if optim.optimizer == "lamb":
        return Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=optim.fused
    )


def lr_factor(optim: OptimSettings) -> Callable[[int], float]:
    """The learning rate of a step (from 0) as a share of its peak.

    It rises linearly over the first `warmup_ratio` of the steps, then falls to `min_lr_ratio` at
    the last: linearly, polynomially (`decay_power`), or not at all.
    """
    warmup = round(optim.steps * optim.warmup_ratio)
    floor = optim.min_lr_ratio
    power = optim.decay_power if optim.schedule == "polynomial" else 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optim.schedule == "constant":
            return 1.0
        left = max(0.0, 1.0 - (step - warmup) / max(1, optim.steps - warmup))
        return floor + (1.0 - floor) * float(left**power)

    return factor
