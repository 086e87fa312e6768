"""Maps that autocast must leave alone: queries and keys, by which the memory is searched."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_full_precision(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear map in the precision of its weight, whatever autocast says.

    Under autocast the weight is float32; in a model that is half precision as a whole it is not,
    and then the result is as precise as the weight.

    Args:
        x: [..., in_features], any floating dtype.
    """
    if not torch.is_autocast_enabled(x.device.type):
        plain: Tensor = linear(x.to(linear.weight.dtype))
        return plain
    with torch.autocast(x.device.type, enabled=False):
        mapped: Tensor = linear(x.to(linear.weight.dtype))
    return mapped


def widened(x: Tensor) -> Tensor:
    """At least float32: what scores, softmax and statistics are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
