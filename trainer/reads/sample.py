"""Counts of reads in bounded memory: exact up to a limit, from there on an even sample of entries.

Which entries are in the sample hangs on their ids alone: at level L those whose hash begins with L
zero bits, a 2^-L part of all. The level rises when there are too many. Whatever is in the sample
now was in it from the start, so its counts are exact, and they add up to the same however the reads
were cut over ranks, passes and resumes. (This is Wegman's adaptive sampling, of Flajolet, "On
adaptive sampling", Computing 43, 1990.)

Entries that are read very often must not be missed, so the most read of the others are kept, too,
with counts that are too low by at most `short` (Misra and Gries, merged as by Agarwal et al.,
"Mergeable summaries", PODS 2012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

# A read's share of the attention is summed in whole units, so that no order of summing matters.
UNITS = 1 << 24
_LEVELS = 64


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is kept at most: entries of the sample, and beside it of those that are read most."""

    sample: int
    most_read: int


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Counted reads of entries.

    Attributes:
        ids: ascending, unique: the sample, and, at a level above 0, the most read of the others.
        times: how often each was read. attended: its shares of the attention, in `UNITS`.
        level: of the sample; at 0 all entries that were read are in it and `short` is 0.
        short: by how much `times` of what is not in the sample may be too low.
        all_times, all_attended: sums over all reads, always exact.
    """

    ids: Int64s
    times: Int64s
    attended: Int64s
    level: int = 0
    short: int = 0
    all_times: int = 0
    all_attended: int = 0

    @classmethod
    def none(cls) -> Reads:
        """Nothing was read."""
        empty = np.empty(0, dtype=np.int64)
        return cls(ids=empty, times=empty, attended=empty)

    @classmethod
    def of(cls, ids: Int64s, shares: npt.NDArray[np.floating]) -> Reads:
        """Count single reads.

        Args:
            ids: int64 [n]. shares: of the attention, [n], 0 to 1.
        """
        units = np.rint(shares.astype(np.float64) * UNITS).astype(np.int64)
        return cls._summed(ids, np.ones_like(ids), units)

    @classmethod
    def _summed(cls, ids: Int64s, times: Int64s, attended: Int64s) -> Reads:
        ids, times, attended = _by_id(ids, times, attended)
        return cls(
            ids=ids,
            times=times,
            attended=attended,
            all_times=int(times.sum()),
            all_attended=int(attended.sum()),
        )

    @property
    def sampled(self) -> npt.NDArray[np.bool_]:
        """Which of `ids` are in the sample."""
        return at_level(self.ids, self.level)

    @property
    def distinct(self) -> int:
        """Entries that were read: exact at level 0, else an estimate whose standard error is one
        over the root of the sample's size."""
        return int(self.sampled.sum()) << self.level


def at_level(ids: Int64s, level: int) -> npt.NDArray[np.bool_]:
    """Which entries are in the sample of a level; that of a higher level is a part of it."""
    if level == 0:
        return np.ones(len(ids), dtype=bool)
    within: npt.NDArray[np.bool_] = (hashed(ids) >> np.uint64(_LEVELS - level)) == 0
    return within


def hashed(ids: Int64s) -> Uint64s:
    """An even hash of 64 bits, one-to-one (the last steps of splitmix64)."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sizes_by_level(ids: Int64s) -> Int64s:
    """How many of the ids are in the sample of each level, int64 [64]."""
    zeros = _LEVELS - _bit_lengths(hashed(ids))
    counts = np.bincount(np.minimum(zeros, _LEVELS - 1), minlength=_LEVELS)
    return counts[::-1].cumsum()[::-1].astype(np.int64)


def level_within(sizes: Int64s, limit: int, *, at_least: int) -> int:
    """The lowest level whose sample is within the limit."""
    level = at_least
    while level < _LEVELS - 1 and sizes[level] > limit:
        level += 1
    return level


def merged(parts: Sequence[Reads], limits: Limits, *, level: int = 0) -> Reads:
    """All of these together, within the limits.

    The sample does not hang on the order of the parts, nor on how the reads were dealt to them.

    Args:
        level: of the sample, at least.
    """
    ids, times, attended = _by_id(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.times for part in parts]),
        np.concatenate([part.attended for part in parts]),
    )
    level = max(level, *(part.level for part in parts))
    short = sum(part.short for part in parts)
    sampled = at_level(ids, level)
    if sampled.sum() > limits.sample:
        level = level_within(sizes_by_level(ids[sampled]), limits.sample, at_least=level)
        sampled = at_level(ids, level)
    beside = len(ids) - int(sampled.sum())
    if beside > limits.most_read:
        place = beside - limits.most_read - 1
        least = int(np.partition(times[~sampled], place)[place])
        times = np.where(sampled, times, times - least)
        short += least
        kept = sampled | (times > 0)
        ids, times, attended = ids[kept], times[kept], attended[kept]
    return Reads(
        ids=ids,
        times=times,
        attended=attended,
        level=level,
        short=short,
        all_times=sum(part.all_times for part in parts),
        all_attended=sum(part.all_attended for part in parts),
    )


def _by_id(ids: Int64s, times: Int64s, attended: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = ids[1:] != ids[:-1]
    starts = np.flatnonzero(first)
    if not len(starts):
        return ids, times, attended
    # In whole numbers: floats would be exact only to 2^53.
    return (
        ids[starts],
        np.add.reduceat(times[order], starts),
        np.add.reduceat(attended[order], starts),
    )


def _bit_lengths(values: Uint64s) -> Int64s:
    lengths = np.zeros(len(values), dtype=np.int64)
    for bits in (32, 16, 8, 4, 2, 1):
        high = values >> np.uint64(bits)
        larger = high > 0
        lengths[larger] += bits
        values = np.where(larger, high, values)
    return lengths + (values > 0)
