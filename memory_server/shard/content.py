"""A shard's rows of one content version: ids, documents, removed rows, tokens on disk."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server.api import Entry
from memory_server.shard.partition import Span, deal_rows
from memory_server.store.manifest import SegmentRef, check_domains
from memory_server.store.segments import Int64Array, Segment
from memory_server.store.store import Store

# A part of so many rows gets a block of keys that later epochs share; smaller ones are copied. Low
# enough that a segment of a million entries gives blocks to each of a thousand shards.
LARGE_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Part:
    """A span of one segment: rows [offset, offset + stop - start) of the shard."""

    ref: SegmentRef
    segment: Segment
    start: int
    stop: int
    offset: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class ShardContent:
    """Immutable. Ids and documents are copied together; tokens are views of the mapped segments.

    Rows are in the order of `parts`: first the large ones, each of which gets a block of keys of
    its own, then the small ones, the tail, which share a block.
    """

    def __init__(
        self,
        store: Store,
        version: str,
        *,
        shards: int,
        shard: int,
        domains: Collection[str] = (),
        held: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Map the shard's spans.

        Args:
            domains: only their entries; none named: all.
            held: by a segment's sha256, spans of it that have blocks of keys already. Large parts
                are cut along them, so that rows which moved to this shard when the rows were dealt
                again do not cost a block its use.

        Raises:
            StoreDamaged, UnknownVersion; UnknownDomain: the version has not all of `domains`.
        """
        self.version = version
        self.entry_tokens = store.meta.entry_tokens
        self.pad_token_id = store.meta.pad_token_id
        self.refs = store.manifest(version).of_domains(domains)
        spans = deal_rows([ref.rows for ref in self.refs], shards=shards, shard=shard)
        cut = [
            replace(span, start=start, stop=stop)
            for span in spans
            for start, stop in cut_along(
                span.start, span.stop, (held or {}).get(self.refs[span.segment].sha256, ())
            )
        ]
        cut.sort(key=lambda span: span.stop - span.start < LARGE_ROWS)  # stable
        segments = {span.segment: store.segment(self.refs[span.segment]) for span in spans}
        removed = {i: store.deleted_rows(self.refs[i]) for i in segments}
        self.parts: list[Part] = []
        ids, doc_ids, dead, offset = [], [], [], 0
        for span in cut:
            segment, rows = segments[span.segment], removed[span.segment]
            self.parts.append(_part(self.refs[span.segment], segment, span, offset))
            ids.append(segment.ids[span.start : span.stop])
            doc_ids.append(segment.doc_ids[span.start : span.stop])
            inside = rows[(rows >= span.start) & (rows < span.stop)]
            dead.append(inside - span.start + offset)
            offset += span.stop - span.start
        self.rows = offset
        self.ids: Int64Array = _joined(ids)
        self.doc_ids: Int64Array = _joined(doc_ids)
        self.dead_rows: Int64Array = _joined(dead)
        self.is_live = np.ones(self.rows, dtype=bool)
        self.is_live[self.dead_rows] = False
        self._offsets = np.array([part.offset for part in self.parts], dtype=np.int64)
        self._by_id: tuple[Int64Array, Int64Array] | None = None

    @property
    def large_parts(self) -> list[Part]:
        """Those that get blocks of their own."""
        return [part for part in self.parts if part.rows >= LARGE_ROWS]

    @property
    def tail_start(self) -> int:
        """The first row of the tail."""
        return sum(part.rows for part in self.large_parts)

    @property
    def live_rows(self) -> int:
        return self.rows - len(self.dead_rows)

    @property
    def token_bytes(self) -> int:
        return sum(part.segment.tokens[part.start : part.stop].nbytes for part in self.parts)

    @property
    def bytes_beside_tokens(self) -> int:
        """Of what is held in memory for the rows: ids, documents, marks."""
        return self.ids.nbytes + self.doc_ids.nbytes + self.is_live.nbytes + self.dead_rows.nbytes

    def tokens(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Tokens of the rows, stored dtype, [..., S]; a row of -1 gives pads."""
        dtype = self.parts[0].segment.tokens.dtype if self.parts else np.int32
        flat = rows.reshape(-1)
        out = np.full((len(flat), self.entry_tokens), self.pad_token_id, dtype=dtype)
        where = np.searchsorted(self._offsets, flat, side="right") - 1
        where[flat < 0] = -1
        for position in np.unique(where[where >= 0]):
            part = self.parts[position]
            chosen = np.flatnonzero(where == position)
            # A gather on the mapped view: a thousand times faster than ChunkedArray.take.
            out[chosen] = part.segment.tokens.take(flat[chosen] - part.offset + part.start, axis=0)
        return out.reshape(*rows.shape, self.entry_tokens)

    def check_domains(self, names: Collection[str]) -> None:
        """Raises UnknownDomain: the version has not all of these."""
        check_domains(self.version, self.refs, names)

    def spans_of(self, domains: Collection[str]) -> list[tuple[int, int]]:
        """The rows of these domains: (first, one past the last) of each run, ascending."""
        spans: list[tuple[int, int]] = []
        for part in self.parts:
            if part.ref.domain not in domains:
                continue
            first = part.offset
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, part.offset + part.rows))
        return spans

    def find(self, ids: Sequence[int], domains: Collection[str] = ()) -> list[Entry]:
        """The live entries that this shard holds, of those asked.

        Args:
            domains: only of these; none named: of all.

        Raises:
            UnknownDomain: the version has not all of them.
        """
        self.check_domains(domains)
        if self._by_id is None:
            live = np.flatnonzero(self.is_live)
            rows = live[np.argsort(self.ids[live], kind="stable")]
            self._by_id = rows, self.ids[rows]
        by_id, sorted_ids = self._by_id
        wanted = np.asarray(ids, dtype=np.int64)
        positions = np.searchsorted(sorted_ids, wanted)
        found = positions < len(sorted_ids)
        found[found] = sorted_ids[positions[found]] == wanted[found]
        rows = by_id[positions[found]]
        if domains:
            rows = rows[[self._part_of(int(row)).ref.domain in domains for row in rows]]
        return [self._entry(int(row)) for row in rows]

    def tail_rows_kept_from(self, other: "ShardContent") -> tuple[Int64Array, Int64Array]:
        """Rows of the tail that are live here and there: (rows here, the same rows there)."""
        theirs: dict[str, list[Part]] = {}
        for part in other.parts:
            theirs.setdefault(part.ref.sha256, []).append(part)
        mine_rows, their_rows = [], []
        for part in self.parts[len(self.large_parts) :]:
            for source in theirs.get(part.ref.sha256, ()):
                start, stop = max(part.start, source.start), min(part.stop, source.stop)
                if start < stop:
                    inside = np.arange(start, stop, dtype=np.int64)
                    mine_rows.append(inside - part.start + part.offset)
                    their_rows.append(inside - source.start + source.offset)
        mine, rows = _joined(mine_rows), _joined(their_rows)
        both = self.is_live[mine] & other.is_live[rows]
        return mine[both], rows[both]

    def _part_of(self, row: int) -> Part:
        return self.parts[int(np.searchsorted(self._offsets, row, side="right")) - 1]

    def _entry(self, row: int) -> Entry:
        part = self._part_of(row)
        at = [row - part.offset + part.start]
        return Entry(
            id=int(self.ids[row]),
            doc_id=int(self.doc_ids[row]),
            tokens=tuple(int(token) for token in part.segment.tokens[at[0]]),
            text=part.segment.strings("text", at)[0],
            title=part.segment.strings("title", at)[0],
            source=part.segment.strings("source", at)[0],
        )


def _part(ref: SegmentRef, segment: Segment, span: Span, offset: int) -> Part:
    return Part(ref=ref, segment=segment, start=span.start, stop=span.stop, offset=offset)


def cut_along(start: int, stop: int, held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut [start, stop) along the held span that covers most of it: before, inside, after.

    Only a large overlap is worth a cut; pieces that are empty are left out.
    """
    overlaps = [(max(start, low), min(stop, high)) for low, high in held]
    low, high = max(overlaps, key=lambda span: span[1] - span[0], default=(start, start))
    if high - low < LARGE_ROWS:
        return [(start, stop)]
    return [(a, b) for a, b in ((start, low), (low, high), (high, stop)) if a < b]


def _joined(arrays: list[Int64Array]) -> Int64Array:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def taken(
    values: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], pads: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """`values[rows]`, -1 in pads."""
    if not len(values):
        return np.full(rows.shape, -1, dtype=np.int64)
    return np.where(pads, -1, values[np.where(pads, 0, rows)])
