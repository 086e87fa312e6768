"""Where a version's live entries lie: found by id or by document in the mapped segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory_server.store.id_rows import rows_with
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.segments import Segment
from memory_server.store.store import Store

Int64Array = NDArray[np.int64]
Check = Callable[[SegmentRef], None]
"""Called with each segment that content is read from, before it is read."""


def unchecked(ref: SegmentRef) -> None:
    """For content that is only shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A live entry, without its tokens."""

    id: int
    doc_id: int
    domain: str
    title: str
    source: str
    text: str


def entries_by_id(
    store: Store, manifest: Manifest, ids: Sequence[int], *, check: Check = unchecked
) -> dict[int, Found]:
    """The live entries with these ids; those that do not live are left out.

    One pass over the ids of the segments that may hold one.
    """
    wanted = np.unique(np.array(ids, dtype=np.int64))
    found = {}
    for ref in manifest.segments:
        inside = wanted[(wanted >= ref.min_id) & (wanted <= ref.max_id)]
        if len(inside):
            segment = store.segment(ref)
            rows = rows_with(segment.ids, inside)
            found.update({entry.id: entry for entry in _live(store, ref, segment, rows, check)})
    return found


def entries_by_document(
    store: Store, manifest: Manifest, doc_ids: Sequence[int], *, check: Check = unchecked
) -> dict[int, list[Found]]:
    """The live entries of these documents, by ascending id; documents without any are left out.

    One pass over the documents' ids of the segments that may hold one.
    """
    wanted = np.unique(np.array(doc_ids, dtype=np.int64))
    found: dict[int, list[Found]] = {}
    for ref in manifest.segments:
        inside = wanted
        if ref.min_doc_id is not None and ref.max_doc_id is not None:
            inside = wanted[(wanted >= ref.min_doc_id) & (wanted <= ref.max_doc_id)]
        if not len(inside):
            continue
        segment = store.segment(ref)
        rows = rows_with(segment.doc_ids, inside)
        for entry in _live(store, ref, segment, rows, check):
            found.setdefault(entry.doc_id, []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: entry.id)
    return found


def largest_doc_id(store: Store, manifest: Manifest) -> int:
    """The largest document's id of a version's segments, removed rows included; -1 if none."""
    largest = -1
    for ref in manifest.segments:
        if ref.max_doc_id is not None:
            largest = max(largest, ref.max_doc_id)
        elif ref.rows:
            largest = max(largest, int(store.segment(ref).doc_ids.max()))
    return largest


def _live(
    store: Store, ref: SegmentRef, segment: Segment, rows: Int64Array, check: Check
) -> Iterator[Found]:
    if not len(rows):
        return
    check(ref)
    rows = np.setdiff1d(rows, store.deleted_rows(ref), assume_unique=True)
    strings = [segment.strings(column, rows.tolist()) for column in ("title", "source", "text")]
    for row, title, source, text in zip(rows.tolist(), *strings, strict=True):
        yield Found(
            id=int(segment.ids[row]),
            doc_id=int(segment.doc_ids[row]),
            domain=ref.domain,
            title=title,
            source=source,
            text=text,
        )
