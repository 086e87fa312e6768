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
from trainer.data.cursor import Cursor, batch_epochs
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


class Shuffle(Protocol):
    """The order of one dataset's sequences within each epoch: a bijection on [0, size)."""

    @property
    def size(self) -> int:
        """Sequences of the dataset."""

    def at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sequences at these positions of an epoch, int64 of the same shape [X]."""


@dataclass(frozen=True)
class WholeShuffle:
    """All sequences in one shuffle."""

    size: int
    seed: int

    def at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """See `Shuffle.at`."""
        return permute(positions, n=self.size, seed=self.seed, epoch=epoch)


class FileShuffle:
    """Files in another order each epoch, and so many of them at a time shuffled together.

    While one group lasts, only its files are read, so that a corpus on another filesystem need not
    be in the cache as a whole. Memory is of the order of the number of files.
    """

    def __init__(self, rows: Sequence[int], files: int, seed: int) -> None:
        """Note the files.

        Args:
            rows: sequences of each file.
            files: how many are shuffled together, at least 1.
            seed: of both shuffles.
        """
        if files < 1 or not len(rows):
            raise ValueError(f"need files >= 1 and at least one file, got {files} of {len(rows)}")
        self._rows, self._files, self._seed = np.asarray(rows, dtype=np.int64), files, seed
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])

    @property
    def size(self) -> int:
        """See `Shuffle.size`."""
        return int(self._starts[-1])

    def at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """See `Shuffle.at`."""
        count = len(self._rows)
        files = permute(np.arange(count), n=count, seed=self._seed, epoch=epoch)
        ends = np.cumsum(self._rows[files])
        last = np.minimum(np.arange(self._files, count + self._files, self._files), count)
        group_ends = ends[last - 1]
        group = np.searchsorted(group_ends, positions, side="right")
        found = np.empty_like(positions)
        for number in np.unique(group):
            here = np.flatnonzero(group == number)
            begin = 0 if number == 0 else int(group_ends[number - 1])
            size = int(group_ends[number]) - begin
            seed = int(rng.derive_key(self._seed, int(number))[0]) % 2**63
            within = begin + permute(positions[here] - begin, n=size, seed=seed, epoch=epoch)
            file = np.searchsorted(ends, within, side="right")
            offset = within - (ends[file] - self._rows[files[file]])
            found[here] = self._starts[files[file]] + offset
        return found


@dataclass(frozen=True)
class ShuffledOrder:
    """One dataset: every epoch is another shuffle, each sequence once in it."""

    shuffle: Shuffle

    def take(self, cursor: Cursor, count: int) -> Taken:
        """See `Order.take`."""
        n = self.shuffle.size
        epochs = batch_epochs(cursor, n=n, batch_size=count)
        positions = (cursor.position + np.arange(count, dtype=np.int64)) % n
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            indices[now] = self.shuffle.at(positions[now], int(epoch))
        passed, position = divmod(cursor.position + count, n)
        following = Cursor(cursor.epoch + passed, position)
        return Taken(indices=indices, epochs=epochs, cursor=following)


class MixedOrder:
    """Several datasets by weight, each in shuffled epochs of its own.

    Of every 4096 consecutive sequences each dataset gives its exact share, in an order that is
    drawn once. A small dataset with a large weight is simply gone through more often. The cursor's
    position counts all sequences so far; its epoch stays 0, because datasets end at other times.
    """

    def __init__(self, shuffles: Sequence[Shuffle], weights: Sequence[float], seed: int) -> None:
        """Deal the period.

        Args:
            shuffles: of each dataset.
            weights: its share, in any unit; empty: in proportion to the sizes.
            seed: of the order.

        Raises:
            ValueError: another number of weights than datasets, or a weight that is too small.
        """
        sizes = [shuffle.size for shuffle in shuffles]
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
        self._shuffles, self._counts = tuple(shuffles), counts
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
        for number, shuffle in enumerate(self._shuffles):
            here = np.flatnonzero(datasets == number)
            if not here.size:
                continue
            nth = period[here] * self._counts[number] + self._before[place[here]]
            epochs[here], within = np.divmod(nth, shuffle.size)
            for epoch in np.unique(epochs[here]):
                now = epochs[here] == epoch
                shuffled = shuffle.at(within[now], int(epoch))
                indices[here[now]] = self._offsets[number] + shuffled
        return Taken(indices=indices, epochs=epochs, cursor=Cursor(0, cursor.position + count))


def _whole_shares(shares: NDArray[np.float64]) -> Int64Array:
    """Shares of 1 as whole numbers that sum to the period, each less than 1 from its exact one."""
    exact = shares * _PERIOD
    counts = np.floor(exact).astype(np.int64)
    missing = _PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def order_of(
    rows: Sequence[Sequence[int]], *, weights: Sequence[float], files: int, seed: int
) -> Order:
    """The order of one dataset or several.

    Args:
        rows: for each dataset, the sequences of each of its files.
        weights: as in `MixedOrder`.
        files: as in `FileShuffle`; 0: all of a dataset's sequences are shuffled together.
        seed: of everything.
    """
    shuffles: list[Shuffle] = []
    for number, of_files in enumerate(rows):
        # A single dataset's order is that of the seed itself.
        own = seed if len(rows) == 1 else int(rng.derive_key(seed, number)[0]) % 2**63
        whole = WholeShuffle(sum(of_files), own)
        shuffles.append(FileShuffle(of_files, files, own) if files else whole)
    return ShuffledOrder(shuffles[0]) if len(rows) == 1 else MixedOrder(shuffles, weights, seed)
