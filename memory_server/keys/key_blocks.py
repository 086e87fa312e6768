"""Keys in immutable blocks that epochs share: an edit adds a block, and copies none.

A block holds the keys that one set of weights made for consecutive rows of one segment. An epoch's
keys are views of blocks, laid end to end in the order of the shard's rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.keys.key_codes import KeyCodes


@dataclass(eq=False, kw_only=True)
class KeyBlock:
    """Whole once it is made; afterwards only `accelerator` is set, once.

    Attributes:
        largest_norm: the largest Euclidean norm of an exact key.
        checksum: CRC-32 of the exact keys' float32 bytes in row order.
        origin: (sha256 of the segment, first row, one past the last) of the rows; None for a block
            that no other epoch may share.
        accelerator: an approximate index over exactly these rows, if one was built.
    """

    codes: KeyCodes
    largest_norm: float
    checksum: int
    origin: tuple[str, int, int] | None = None
    accelerator: Any = None

    @property
    def rows(self) -> int:
        return self.codes.rows


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """Rows [start, stop) of a block, which are rows offset, offset + 1, ... of an epoch."""

    block: KeyBlock
    start: int
    stop: int
    offset: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def codes(self) -> KeyCodes:
        return self.block.codes.view(self.start, self.stop)


class BlockedKeys:
    """One epoch's keys, [N, Q], as views of blocks."""

    def __init__(
        self, parts: Sequence[tuple[KeyBlock, int, int]], width: int, device: torch.device
    ) -> None:
        """Lay (block, start, stop) end to end."""
        views, offset = [], 0
        for block, start, stop in parts:
            views.append(BlockView(block=block, start=start, stop=stop, offset=offset))
            offset += stop - start
        self.views: tuple[BlockView, ...] = tuple(views)
        self.rows = offset
        self.width = width
        self.device = device
        self.exact = all(view.block.codes.exact for view in views)
        self.largest_norm = max((view.block.largest_norm for view in views), default=0.0)
        self._offsets = torch.tensor([view.offset for view in views], device=device)

    @property
    def blocks(self) -> tuple[KeyBlock, ...]:
        return tuple(view.block for view in self.views)

    @property
    def nbytes(self) -> int:
        """Of whole blocks, shared or not."""
        return sum({id(block): block.codes.nbytes for block in self.blocks}.values())

    def gather(self, rows: Tensor) -> Tensor:
        """What the codes of these rows stand for, float32 [..., Q]; rows int64 [...], valid."""
        if len(self.views) == 1:
            view = self.views[0]
            return view.block.codes.gather(rows + view.start if view.start else rows)
        flat = rows.reshape(-1)
        out = torch.empty(len(flat), self.width, device=self.device)
        where = torch.searchsorted(self._offsets, flat, right=True) - 1
        for position in where.unique().tolist():
            view = self.views[position]
            chosen = (where == position).nonzero().squeeze(1)
            out[chosen] = view.block.codes.gather(flat[chosen] - view.offset + view.start)
        return out.reshape(*rows.shape, self.width)

    def exact_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these rows have their exact keys here, bool [n]."""
        if self.exact:
            return np.ones(len(rows), dtype=bool)
        offsets = np.array([view.offset for view in self.views])
        exact = np.array([view.block.codes.exact for view in self.views])
        return np.asarray(exact[np.searchsorted(offsets, rows, side="right") - 1], dtype=bool)

    def pieces(self, at_most: int) -> Iterator[tuple[int, int, KeyCodes, int]]:
        """Runs of rows within one block: (first row, one past the last, codes, their start)."""
        for view in self.views:
            for first in range(0, view.rows, at_most):
                count = min(at_most, view.rows - first)
                row = view.offset + first
                yield row, row + count, view.block.codes, view.start + first
