"""Which sequences come next: one shuffled dataset, or several mixed by weight.

An order is a pure function of a cursor, so that any number of ranks agrees on it and a run resumes
to the exact next sequence. Nothing in it grows with the data: no permutation is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data import rng
from trainer.data.cursor import Cursor, batch_epochs, global_batch
from trainer.data.shuffle import permute

Int64Array = NDArray[np.int64]

# Shares are kept exactly over so many sequences: 1/4096 is the finest weight.
_PERIOD = 4096


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The next B sequences.

    Attributes:
        indices: int64 [B], in the dataset (in several: numbered one dataset after the other).
        epochs: int64 [B], how often the sequence's dataset had been gone through before.
        cursor: behind them.
    """

    indices: Int64Array
    epochs: Int64Array
    cursor: Cursor


class Order(Protocol):
    """An endless order of sequences."""

    def take(self, cursor: Cursor, count: int) -> Taken:
        """The next `count` sequences. Raises ValueError: count < 1, or no cursor of this order."""


@dataclass(frozen=True)
class ShuffledOrder:
    """One dataset of n sequences: every epoch is another shuffle, each sequence once in it."""

    n: int
    seed: int

    def take(self, cursor: Cursor, count: int) -> Taken:
        """See `Order.take`."""
        indices, following = global_batch(cursor, n=self.n, batch_size=count, seed=self.seed)
        epochs = batch_epochs(cursor, n=self.n, batch_size=count)
        return Taken(indices=indices, epochs=epochs, cursor=following)


class MixedOrder:
    """Several datasets by weight, each in shuffled epochs of its own.

    Of every 4096 consecutive sequences each dataset gives its exact share, in an order that is
    drawn once. A small dataset with a large weight is simply gone through more often. The cursor's
    position counts all sequences so far; its epoch stays 0, because datasets end at other times.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Deal the period.

        Args:
            sizes: sequences of each dataset.
            weights: its share, in any unit; empty: in proportion to the sizes.
            seed: of the order.

        Raises:
            ValueError: another number of weights than datasets, or a weight that is too small.
        """
        shares = np.asarray(weights if len(weights) else sizes, dtype=np.float64)
        if len(shares) != len(sizes) or not len(sizes) or min(sizes) < 1:
            raise ValueError(
                f"{len(sizes)} datasets of {list(sizes)} sequences and {len(shares)} weights: need "
                "one weight for each, and at least one sequence in each"
            )
        if not np.isfinite(shares).all() or (shares <= 0).any():
            raise ValueError(f"weights {list(weights)}: must be finite and above 0")
        counts = _whole_shares(shares / shares.sum())
        if (counts == 0).any():
            raise ValueError(
                f"weights {shares.tolist()}: number {int(np.argmin(counts)) + 1} is less than "
                f"1/{_PERIOD} of all; leave that one out or raise its weight"
            )
        self._sizes, self._seed, self._counts = tuple(sizes), seed, counts
        self._offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        dealt = np.repeat(np.arange(len(counts)), counts)
        self._dataset = dealt[permute(np.arange(_PERIOD), n=_PERIOD, seed=seed, epoch=0)]
        # How many of the period's sequences before each place come from the same dataset.
        self._before = np.zeros(_PERIOD, dtype=np.int64)
        for number, count in enumerate(counts):
            self._before[self._dataset == number] = np.arange(count)

    def take(self, cursor: Cursor, count: int) -> Taken:
        """See `Order.take`."""
        if count < 1:
            raise ValueError(f"need count >= 1, got {count}")
        if cursor.epoch:
            raise ValueError(
                f"the data cursor is in epoch {cursor.epoch}, but a mixture of datasets has only "
                "epoch 0: it belongs to a run on one corpus; resume with that one"
            )
        positions = cursor.position + np.arange(count, dtype=np.int64)
        period, place = np.divmod(positions, _PERIOD)
        datasets = self._dataset[place]
        indices, epochs = np.empty((2, count), dtype=np.int64)
        for number, size in enumerate(self._sizes):
            here = np.flatnonzero(datasets == number)
            if not here.size:
                continue
            nth = period[here] * self._counts[number] + self._before[place[here]]
            epochs[here], within = np.divmod(nth, size)
            seed = int(rng.derive_key(self._seed, number)[0]) % 2**63
            for epoch in np.unique(epochs[here]):
                now = epochs[here] == epoch
                shuffled = permute(within[now], n=size, seed=seed, epoch=int(epoch))
                indices[here[now]] = self._offsets[number] + shuffled
        return Taken(indices=indices, epochs=epochs, cursor=Cursor(0, cursor.position + count))


def _whole_shares(shares: NDArray[np.float64]) -> Int64Array:
    """Shares of 1 as whole numbers that sum to the period, each less than 1 from its exact one."""
    exact = shares * _PERIOD
    counts = np.floor(exact).astype(np.int64)
    missing = _PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts
