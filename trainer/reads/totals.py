"""Reads of a whole run, added up window by window. A window costs as much as it brings, not as
much as is there already."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.reads.sample import Limits, Reads, at_level, merged

_NEW_AT_LEAST = 4096
_NEW_SHARE = 8


class ReadTotals:
    """Sums of reads, of which some are new: entries that are not among the others yet."""

    def __init__(self, limits: Limits, reads: Reads | None = None) -> None:
        """Go on from `reads`; its arrays are copied."""
        self._limits = limits
        self._new = Reads.none()
        self._known = _copied(merged([reads or Reads.none()], limits))
        self._known_sampled = int(self._known.sampled.sum())

    @property
    def distinct(self) -> int:
        """As `Reads.distinct`."""
        if self._new.level > self._known.level:
            return self.whole().distinct
        sampled = int(at_level(self._new.ids, self._known.level).sum())
        return (self._known_sampled + sampled) << self._known.level

    @property
    def all_times(self) -> int:
        """All reads."""
        return self._known.all_times + self._new.all_times

    def add(self, reads: Reads) -> None:
        """Count a window's reads, too."""
        if reads.level > self._known.level:
            # Whoever was left out of the window has no exact count from here on.
            self._new = merged([self._new, reads], self._limits)
            self.whole()
            return
        known = self._known
        place = np.searchsorted(known.ids, reads.ids)
        place[place == len(known.ids)] = 0
        there = known.ids[place] == reads.ids if len(known.ids) else np.zeros(len(place), bool)
        known.times[place[there]] += reads.times[there]
        known.attended[place[there]] += reads.attended[there]
        times, attended = int(reads.times[there].sum()), int(reads.attended[there].sum())
        self._known = replace(
            known,
            all_times=known.all_times + times,
            all_attended=known.all_attended + attended,
        )
        rest = replace(
            reads,
            ids=reads.ids[~there],
            times=reads.times[~there],
            attended=reads.attended[~there],
            all_times=reads.all_times - times,
            all_attended=reads.all_attended - attended,
        )
        self._new = merged([self._new, rest], self._limits, level=known.level)
        sampled = self._known_sampled + int(self._new.sampled.sum())
        many = max(_NEW_AT_LEAST, len(known.ids) // _NEW_SHARE)
        if sampled > self._limits.sample or len(self._new.ids) > many:
            self.whole()

    def whole(self) -> Reads:
        """All of it. Its arrays change with the next `add`."""
        if len(self._new.ids) or self._new.all_times:
            self._known = _copied(merged([self._known, self._new], self._limits))
            self._known_sampled = int(self._known.sampled.sum())
            self._new = Reads.none()
        return self._known


def _copied(reads: Reads) -> Reads:
    return replace(
        reads, ids=reads.ids.copy(), times=reads.times.copy(), attended=reads.attended.copy()
    )
