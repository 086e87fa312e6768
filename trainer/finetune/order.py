"""In which order an epoch's rows are learned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochOrder(Sampler[int]):
    """A permutation of the rows that seed and epoch decide, and nothing else.

    Under torchrun every process draws the whole order and takes its share of it. A process's global
    random state must not play a part: dropout moves it on differently in each, and their shares
    would be of different orders.
    """

    def __init__(
        self, lengths: Sequence[int], *, seed: int, group_size: int = 0, leave_out: int = 0
    ) -> None:
        """Take the rows; the epoch is the first until `set_epoch`.

        Args:
            lengths: tokens of each row.
            seed: not negative.
            group_size: so many rows in a row are of like length; 0: they need not be.
            leave_out: so many rows, drawn anew for each epoch, are not given.
        """
        self._lengths = lengths
        self._seed = seed
        self._group_size = group_size
        self._kept = len(lengths) - leave_out
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, and by accelerate, before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._kept

    def __iter__(self) -> Iterator[int]:
        # Seed 0 in epoch 1 must not be seed 1 in epoch 0, so the two are not added.
        (mixed,) = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed))
        rows: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        rows = rows[: self._kept]
        if self._group_size:
            lengths = [self._lengths[row] for row in rows]
            places = get_length_grouped_indices(lengths, self._group_size, generator=generator)
            rows = [rows[place] for place in places]
        return iter(rows)
