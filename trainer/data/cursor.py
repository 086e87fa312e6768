"""Where training stands in the data, and which sequences come next.

The stream of sequences is the concatenation of shuffled epochs, and a cursor is a place in it.
It counts sequences of the whole job, not of a rank: ranks take contiguous parts of the same
global batch, so a run resumes to the exact next batch at the same or another world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: `position` sequences of `epoch` (both from 0) are behind it."""

    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.position < 0:
            raise ValueError(
                f"a data cursor's epoch and position must be >= 0, got epoch={self.epoch}, "
                f"position={self.position}"
            )

    def to_json(self) -> dict[str, int]:
        """Return the cursor as JSON-able values; `from_json` is its inverse."""
        return {"epoch": self.epoch, "position": self.position}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Cursor:
        """Rebuild a cursor.

        Raises:
            ValueError: not exactly the integers "epoch" and "position".
        """
        epoch, position = values.get("epoch"), values.get("position")
        if (
            set(values) != {"epoch", "position"}
            or type(epoch) is not int
            or type(position) is not int
        ):
            raise ValueError(
                f"a data cursor is {{'epoch': int, 'position': int}}, got {dict(values)!r}; the "
                "checkpoint is damaged or of another format"
            )
        return cls(epoch, position)


def _check(cursor: Cursor, n: int, batch_size: int) -> None:
    if n < 1 or batch_size < 1:
        raise ValueError(
            f"need n >= 1 sequences and batch_size >= 1, got n={n}, batch_size={batch_size}"
        )
    if cursor.position >= n:
        raise ValueError(
            f"the data cursor is at position {cursor.position} of an epoch of {n} sequences: it "
            "belongs to another corpus; resume with the corpus that the checkpoint was trained on"
        )


def batch_epochs(cursor: Cursor, *, n: int, batch_size: int) -> NDArray[np.int64]:
    """Return the epoch that each sequence of the next batch belongs to, int64 [batch_size].

    Raises:
        ValueError: n or batch_size is below 1, or the cursor lies outside an epoch of n.
    """
    _check(cursor, n, batch_size)
    return cursor.epoch + np.arange(cursor.position, cursor.position + batch_size) // n


def rank_slice(indices: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Return a rank's contiguous, equal part of a global batch (a view, [batch / world_size]).

    Raises:
        ValueError: rank is not in [0, world_size), or the batch does not divide.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}"
        )
    share, rest = divmod(len(indices), world_size)
    if rest:
        raise ValueError(
            f"a batch of {len(indices)} sequences does not divide over {world_size} ranks; use a "
            "batch size that is a multiple of the number of trainers"
        )
    return indices[rank * share : (rank + 1) * share]
