"""No id may live twice: what comes is compared with what stays, where ranges of ids meet."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from memory_server.errors import DuplicateEntry
from memory_server.store.id_rows import shared_ids
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.reader import StoreReader
from memory_server.store.segments import Int64Array, Segment


def refuse_known_ids(
    reader: StoreReader,
    kept: Sequence[SegmentRef],
    deletions: Mapping[str, Int64Array],
    added: Sequence[SegmentRef],
    paths: Sequence[Path],
) -> None:
    """Refuse an added id that would live twice; only where ranges of ids meet is anything read."""
    for index, (ref, path) in enumerate(zip(added, paths, strict=True)):
        ids = Segment(path).ids
        for other in kept:
            if _ranges_meet(ref, other):
                _refuse(shared_ids(ids, _ids(reader, other, deletions)), str(path))
        for other, other_path in zip(added[:index], paths[:index], strict=True):
            if _ranges_meet(ref, other):
                _refuse(shared_ids(ids, Segment(other_path).ids), str(path))


def refuse_plugged_ids(
    reader: StoreReader,
    kept: Sequence[SegmentRef],
    deletions: Mapping[str, Int64Array],
    plugged: Sequence[SegmentRef],
    added: Sequence[SegmentRef],
    paths: Sequence[Path],
    sources: Sequence[Manifest],
) -> None:
    """The same for segments that come back: what lived beside them then is not looked at."""
    beside = [frozenset(source.segments) for source in sources]
    for index, ref in enumerate(plugged):
        where = f"domain {ref.domain!r}, which comes back,"
        for other in (*kept, *plugged[:index]):
            if any(ref in then and other in then for then in beside):
                continue
            if _ranges_meet(ref, other):
                shared = shared_ids(_ids(reader, ref, {}), _ids(reader, other, deletions))
                _refuse(shared, where)
        for other, path in zip(added, paths, strict=True):
            if _ranges_meet(ref, other):
                _refuse(shared_ids(_ids(reader, ref, {}), Segment(path).ids), where)


def _ids(reader: StoreReader, ref: SegmentRef, deletions: Mapping[str, Int64Array]) -> Int64Array:
    """Live ids, of a segment whose removed rows may not be written yet."""
    if ref.deletions is not None and ref.deletions in deletions:
        return np.delete(reader.segment(ref).ids, deletions[ref.deletions])
    return reader.live_ids(ref)


def _refuse(shared: Int64Array, where: str) -> None:
    if len(shared):
        raise DuplicateEntry(
            f"segment {where} repeats {len(shared)} ids that are live already, such as "
            f"{shared[0]}; every id must be unique (to replace an entry, remove the old id in the "
            "same commit)"
        )


def _ranges_meet(a: SegmentRef, b: SegmentRef) -> bool:
    return bool(a.live and b.live and a.min_id <= b.max_id and b.min_id <= a.max_id)
