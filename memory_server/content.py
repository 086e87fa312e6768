"""A shard's rows of one content version: ids, documents, removed rows, tokens on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server.api import Entry
from memory_server.manifest import SegmentRef
from memory_server.partition import Span, deal_rows
from memory_server.segments import Int64Array, Segment
from memory_server.store import Store


@dataclass(frozen=True, kw_only=True)
class Part:
    """A span of one segment: rows [offset, offset + stop - start) of the shard."""

    ref: SegmentRef
    segment: Segment
    start: int
    stop: int
    offset: int


class ShardContent:
    """Immutable. Ids and documents are copied together; tokens are views of the mapped segments."""

    def __init__(self, store: Store, version: str, *, shards: int, shard: int) -> None:
        """Map the shard's spans. Raises StoreDamaged or UnknownVersion."""
        self.version = version
        self.entry_tokens = store.meta.entry_tokens
        self.pad_token_id = store.meta.pad_token_id
        self.refs = store.manifest(version).segments
        spans = deal_rows([ref.rows for ref in self.refs], shards=shards, shard=shard)
        self.parts: list[Part] = []
        ids, doc_ids, dead, offset = [], [], [], 0
        for span in spans:
            ref = self.refs[span.segment]
            segment = store.segment(ref)
            self.parts.append(_part(ref, segment, span, offset))
            ids.append(segment.ids[span.start : span.stop])
            doc_ids.append(segment.doc_ids[span.start : span.stop])
            rows = store.deleted_rows(ref)
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
        self._by_id: Int64Array | None = None

    @property
    def live_rows(self) -> int:
        return self.rows - len(self.dead_rows)

    @property
    def token_bytes(self) -> int:
        return sum(part.segment.tokens[part.start : part.stop].nbytes for part in self.parts)

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

    def find(self, ids: Sequence[int]) -> list[Entry]:
        """The live entries that this shard holds, of those asked."""
        if self._by_id is None:
            live = np.flatnonzero(self.is_live)
            self._by_id = live[np.argsort(self.ids[live], kind="stable")]
        sorted_ids = self.ids[self._by_id]
        wanted = np.asarray(ids, dtype=np.int64)
        positions = np.searchsorted(sorted_ids, wanted)
        found = positions < len(sorted_ids)
        found[found] = sorted_ids[positions[found]] == wanted[found]
        return [self._entry(int(row)) for row in self._by_id[positions[found]]]

    def rows_kept_from(self, other: "ShardContent") -> tuple[Int64Array, Int64Array]:
        """Rows that are live here and there: (rows of this content, the same rows of the other)."""
        theirs = {part.ref.sha256: part for part in other.parts}
        mine_rows, their_rows = [], []
        for part in self.parts:
            source = theirs.get(part.ref.sha256)
            if source is None:
                continue
            start, stop = max(part.start, source.start), min(part.stop, source.stop)
            if start < stop:
                inside = np.arange(start, stop, dtype=np.int64)
                mine_rows.append(inside - part.start + part.offset)
                their_rows.append(inside - source.start + source.offset)
        mine, rows = _joined(mine_rows), _joined(their_rows)
        both = self.is_live[mine] & other.is_live[rows]
        return mine[both], rows[both]

    def same_rows(self, other: "ShardContent") -> bool:
        """Whether every row is the same row of the same segment, and no row came back to life."""
        return [_where(part) for part in self.parts] == [
            _where(part) for part in other.parts
        ] and not bool((self.is_live & ~other.is_live).any())

    def _entry(self, row: int) -> Entry:
        part = self.parts[int(np.searchsorted(self._offsets, row, side="right")) - 1]
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


def _where(part: Part) -> tuple[str, int, int]:
    return part.ref.sha256, part.start, part.stop


def _joined(arrays: list[Int64Array]) -> Int64Array:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def taken(
    values: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], pads: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """`values[rows]`, -1 in pads."""
    if not len(values):
        return np.full(rows.shape, -1, dtype=np.int64)
    return np.where(pads, -1, values[np.where(pads, 0, rows)])
