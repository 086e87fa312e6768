"""A block of queries of one search, with what is used again with every block of keys."""

from functools import cached_property

import torch
from torch import Tensor


class SearchQueries:
    """Queries float32 [B, Q], and the int8 numbers that stand for them."""

    def __init__(self, exact_BQ: Tensor) -> None:
        self.exact_BQ = exact_BQ.contiguous()
        self._rooms: dict[torch.dtype, Tensor] = {}

    @property
    def batch(self) -> int:
        return self.exact_BQ.shape[0]

    @property
    def device(self) -> torch.device:
        return self.exact_BQ.device

    def room(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Room of this shape, whose content is undefined; the next one of its dtype is the same.

        Memory that was just written is many times faster to write than new memory.
        """
        held = self._rooms.get(dtype)
        if held is None or len(held) < rows * columns:
            held = torch.empty(rows * columns, dtype=dtype, device=self.device)
            self._rooms[dtype] = held
        return held[: rows * columns].view(rows, columns)

    @cached_property
    def norms(self) -> Tensor:
        """Euclidean, float32 [B]."""
        norms: Tensor = torch.linalg.vector_norm(self.exact_BQ, dim=1)
        return norms

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor, Tensor]:
        """(int8 [B, Q]; the scale of each, float32 [B]; the norm of what is lost, float32 [B])."""
        scales_B = (self.exact_BQ.abs().amax(dim=1) / 127).clamp_(min=2.0**-100)
        codes_BQ = (self.exact_BQ / scales_B.unsqueeze(1)).round_().clamp_(-127, 127)
        lost_BQ = self.exact_BQ - codes_BQ * scales_B.unsqueeze(1)
        return codes_BQ.to(torch.int8), scales_B, torch.linalg.vector_norm(lost_BQ, dim=1)
