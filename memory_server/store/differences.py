"""What one version holds that another does not, from what their segments do not share.

A segment that both plug is not read when the same rows are removed in both, and otherwise only its
ids. Rows of segments that one alone plugs are candidates; an id that both sides have is compared
whole, so that rewritten segments (`compact`) are no difference.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.reader import StoreReader
from memory_server.store.segments import Int64Array

_COMPARED_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DomainDiff:
    """How many entries of one domain differ. What is replaced counts where it is now."""

    added: int
    removed: int
    replaced: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Diff:
    """Ids, int64, ascending, each in one of the three.

    Attributes:
        added: live in the second version only.
        removed: live in the first only.
        replaced: live in both, with other content or in another domain.
        domains: the counts of each domain where they are not all 0.
    """

    added: Int64Array
    removed: Int64Array
    replaced: Int64Array
    domains: Mapping[str, DomainDiff]

    @property
    def is_empty(self) -> bool:
        return not (len(self.added) or len(self.removed) or len(self.replaced))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one segment, and their ids."""

    ref: SegmentRef
    rows: Int64Array
    ids: Int64Array


def diff(reader: StoreReader, a: Manifest, b: Manifest) -> Diff:
    """From `a` to `b`. Takes about 50 bytes for each entry that differs or was moved.

    Raises:
        StoreDamaged: names the file.
    """
    only_a, only_b = _candidates(reader, a, b), _candidates(reader, b, a)
    side_a, side_b = _Side(only_a), _Side(only_b)
    both = np.intersect1d(side_a.ids, side_b.ids, assume_unique=True)
    differs = np.zeros(len(both), dtype=bool)
    for chosen, one, other in _pairs(both, side_a, side_b):
        differs[chosen] = ~_same(reader, one, other)
    replaced = both[differs]
    added = np.setdiff1d(side_b.ids, both, assume_unique=True)
    removed = np.setdiff1d(side_a.ids, both, assume_unique=True)
    counts = [
        side_b.per_domain(added),
        side_a.per_domain(removed),
        side_b.per_domain(replaced),
    ]
    names = sorted(set().union(*counts))
    return Diff(
        added=added,
        removed=removed,
        replaced=replaced,
        domains={
            name: DomainDiff(
                added=counts[0][name], removed=counts[1][name], replaced=counts[2][name]
            )
            for name in names
        },
    )


class _Side:
    """One version's candidates, to be looked up by id."""

    def __init__(self, parts: Sequence[_Rows]) -> None:
        self.parts = parts
        empty = np.empty(0, dtype=np.int64)
        ids = np.concatenate([empty, *(part.ids for part in parts)])
        part = np.repeat(np.arange(len(parts)), [len(p.ids) for p in parts])
        rows = np.concatenate([empty, *(p.rows for p in parts)])
        order = np.argsort(ids, kind="stable")
        self.ids: Int64Array = ids[order]
        self.part, self.rows = part[order], rows[order]

    def at(self, ids: Int64Array) -> Int64Array:
        """Positions of ids that are here."""
        return np.searchsorted(self.ids, ids)

    def per_domain(self, ids: Int64Array) -> Counter[str]:
        found: Counter[str] = Counter()
        for part, count in zip(
            *np.unique(self.part[self.at(ids)], return_counts=True), strict=True
        ):
            found[self.parts[part].ref.domain] += int(count)
        return found


def _candidates(reader: StoreReader, here: Manifest, there: Manifest) -> list[_Rows]:
    """Rows that are live here, and not the same live row of the same file there."""
    theirs = {ref.file: ref for ref in there.segments}
    found = []
    for ref in here.segments:
        other = theirs.get(ref.file)
        if other is not None and other.domain == ref.domain:
            if other.deletions == ref.deletions:
                continue
            dead_there = reader.deleted_rows(other)
            rows = np.setdiff1d(dead_there, reader.deleted_rows(ref), assume_unique=True)
        else:
            rows = reader.live_rows(ref)
        if len(rows):
            found.append(_Rows(ref, rows, reader.segment(ref).ids[rows]))
    return found


def _pairs(
    both: Int64Array, side_a: _Side, side_b: _Side
) -> Iterator[tuple[Int64Array, _Rows, _Rows]]:
    """The ids of both sides in blocks that lie in one segment each: positions in `both`, and the
    rows of either side."""
    at_a, at_b = side_a.at(both), side_b.at(both)
    part_a, part_b = side_a.part[at_a], side_b.part[at_b]
    pair = part_a * max(len(side_b.parts), 1) + part_b
    order = np.argsort(pair, kind="stable")
    bounds = np.flatnonzero(np.diff(pair[order])) + 1
    for group in np.split(order, bounds) if len(order) else []:
        for start in range(0, len(group), _COMPARED_AT_ONCE):
            chosen = group[start : start + _COMPARED_AT_ONCE]
            yield (
                chosen,
                _Rows(side_a.parts[part_a[chosen[0]]].ref, side_a.rows[at_a[chosen]], both[chosen]),
                _Rows(side_b.parts[part_b[chosen[0]]].ref, side_b.rows[at_b[chosen]], both[chosen]),
            )


def _same(
    reader: StoreReader, one: _Rows, other: _Rows
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each pair of rows whether domain, document, tokens and strings are the same."""
    if one.ref.domain != other.ref.domain:
        return np.zeros(len(one.rows), dtype=bool)
    a, b = reader.segment(one.ref), reader.segment(other.ref)
    same = np.asarray(a.doc_ids[one.rows] == b.doc_ids[other.rows])
    same &= np.all(a.tokens[one.rows] == b.tokens[other.rows], axis=1)
    for column in ("text", "title", "source"):
        same &= _equal_strings(a.taken(column, one.rows), b.taken(column, other.rows))
    return same


def _equal_strings(a: pa.Array, b: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    if a.equals(b):
        return np.ones(len(a), dtype=bool)
    return np.array([x == y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)], dtype=bool)
