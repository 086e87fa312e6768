"""The keys of a block in the portions that an index is trained on and filled with."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.keys.key_blocks import KeyBlock

CHUNK_ROWS = 1 << 16


class BlockKeys:
    """A block's keys, a chunk at a time or a sample."""

    def __init__(self, block: KeyBlock, device: torch.device) -> None:
        self._codes = block.codes
        self.rows = block.rows
        self.width = block.codes.width
        self.device = device

    def at(self, rows: slice) -> Tensor:
        """float32 [n, Q], on the block's device."""
        return self._codes.gather(torch.arange(rows.start, rows.stop, device=self.device))

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.rows, CHUNK_ROWS):
            yield slice(start, min(start + CHUNK_ROWS, self.rows))

    def sample(self, count: int) -> npt.NDArray[np.float32]:
        """Keys of at most `count` rows, the same rows every time."""
        rows = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))[:count]
        keys = self._codes.gather(rows.sort().values.to(self.device))
        sampled: npt.NDArray[np.float32] = keys.cpu().numpy()
        return sampled
