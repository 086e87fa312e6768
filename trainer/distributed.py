"""The few collectives that training needs beside DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_integers(values: Sequence[int], device: torch.device) -> list[int]:
    """Give every rank rank 0's integers; collective. Others pass as many placeholders."""
    tensor = torch.tensor(list(values), dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return [int(v) for v in tensor.tolist()]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place over all ranks; collective; no gradient."""
    dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()
