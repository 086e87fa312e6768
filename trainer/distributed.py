"""The few collectives that training needs beside DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_integers(values: Sequence[int], device: torch.device) -> list[int]:
    """Give every rank rank 0's integers; collective. Others pass as many placeholders."""
    return _from_rank(0, values, device)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place over all ranks; collective; no gradient."""
    dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest of all ranks, in place; collective; no gradient."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_integers(values: Tensor, device: torch.device) -> list[Tensor]:
    """Bring every rank's integers to rank 0; collective.

    Args:
        values: int64 [n] on the host; n may differ from rank to rank.
        device: of the process group's tensors.

    Returns:
        On rank 0 those of all ranks in their order, on the host; elsewhere nothing.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = torch.zeros(ranks, dtype=torch.int64, device=device)
    sizes[rank] = len(values)
    dist.all_reduce(sizes)
    lengths = [int(size) for size in sizes.tolist()]
    padded = torch.zeros(max(lengths), dtype=torch.int64, device=device)
    padded[: len(values)] = values.to(device)
    if rank:
        dist.gather(padded)
        return []
    received = [torch.empty_like(padded) for _ in range(ranks)]
    dist.gather(padded, received)
    return [own[:length].cpu() for own, length in zip(received, lengths, strict=True)]


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def first_failure(message: str | None, device: torch.device) -> str | None:
    """Agree on whether a rank has failed; collective.

    Args:
        message: why this rank has; None: it has not.
        device: of the process group's tensors.

    Returns:
        The message of the first rank that has failed, on every rank; None: none has.
    """
    ranks = dist.get_world_size()
    text = (message or "").encode()
    failed = ranks if message is None else dist.get_rank()
    first = torch.tensor(failed, device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    source = int(first)
    if source == ranks:
        return None
    (length,) = _from_rank(source, [len(text)], device)
    own = list(text) if dist.get_rank() == source else [0] * length
    return bytes(_from_rank(source, own, device)).decode()


def _from_rank(rank: int, values: Sequence[int], device: torch.device) -> list[int]:
    tensor = torch.tensor(list(values), dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=rank)
    return [int(v) for v in tensor.tolist()]
