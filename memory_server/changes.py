"""What a commit would change, worked out and checked before anything is written."""

import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memory_server.errors import DuplicateEntry, TokenizerMismatch, UnknownEntry
from memory_server.manifest import Manifest, SegmentRef
from memory_server.segments import Int64Array, Segment, refuse_duplicates

if TYPE_CHECKING:
    from memory_server.store import Store

NAME_LENGTH = 32  # hexadecimal digits of a checksum that name a file


def reference(store: "Store", path: Path, domain: str) -> SegmentRef:
    segment = Segment(path)
    theirs, ours = segment.meta, store.meta
    if theirs.tokenizer_fingerprint != ours.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"segment {path} was tokenised by {theirs.tokenizer_fingerprint}, the store "
            f"{store.path} "
            f"by {ours.tokenizer_fingerprint}; tokenise the text again with the store's "
            "tokenizer"
        )
    if theirs != ours:
        raise ValueError(
            f"segment {path} has entry_tokens={theirs.entry_tokens}, "
            f"vocab_size={theirs.vocab_size}, "
            f"pad_token_id={theirs.pad_token_id}, but the store {store.path} needs "
            f"{ours.entry_tokens}, {ours.vocab_size}, {ours.pad_token_id}; write the segment "
            "again"
        )
    if segment.rows and (segment.tokens.max() >= ours.vocab_size or segment.tokens.min() < 0):
        raise ValueError(
            f"segment {path} has token ids outside of [0, {ours.vocab_size}); write it again"
        )
    refuse_duplicates(segment.ids, f"segment {path}")
    info = segment.info
    file = f"{info.sha256[:NAME_LENGTH]}.arrow"
    return SegmentRef(file=file, domain=domain, **asdict(info))


def without(
    store: "Store", base: Manifest, removed: Int64Array
) -> tuple[list[SegmentRef], dict[str, Int64Array]]:
    """The base's segments less the removed ids, and the removed rows of those that changed."""
    kept: list[SegmentRef] = []
    changed: dict[str, Int64Array] = {}
    found: list[Int64Array] = []
    for ref in base.segments:
        inside = removed[(removed >= ref.min_id) & (removed <= ref.max_id)]
        if not len(inside):
            kept.append(ref)
            continue
        ids = store.segment(ref).ids
        dead = store.deleted_rows(ref)
        rows = np.setdiff1d(np.flatnonzero(np.isin(ids, inside)), dead, assume_unique=True)
        if not len(rows):
            kept.append(ref)
            continue
        found.append(ids[rows])
        changed[ref.file] = np.union1d(dead, rows).astype(np.int64)
        name = sha256(npy_bytes(changed[ref.file])).hexdigest()[:NAME_LENGTH] + ".npy"
        kept.append(replace(ref, deletions=name, deleted=len(changed[ref.file])))
    unknown = np.setdiff1d(removed, np.concatenate(found) if found else removed[:0])
    if len(unknown):
        raise UnknownEntry(
            f"cannot remove {len(unknown)} ids that version {base.version} does not hold: "
            f"{', '.join(str(i) for i in unknown[:5])}{', …' if len(unknown) > 5 else ''}"
        )
    return kept, changed


def refuse_known_ids(
    store: "Store",
    kept: Sequence[SegmentRef],
    removals: dict[str, Int64Array],
    added: Sequence[SegmentRef],
    additions: Sequence[Path],
) -> None:
    """Refuse an id that would live twice; only segments whose id ranges overlap are read."""
    for index, (ref, path) in enumerate(zip(added, additions, strict=True)):
        others = [*kept, *added[:index]]
        near = [o for o in others if o.rows and o.min_id <= ref.max_id and ref.min_id <= o.max_id]
        if not near or not ref.rows:
            continue
        ids = Segment(path).ids
        for other in near:
            if other in kept:
                removed = removals.get(other.file)
                dead = store.deleted_rows(other) if removed is None else removed
                theirs = np.delete(store.segment(other).ids, dead)
            else:
                theirs = Segment(additions[added.index(other)]).ids
            shared = np.intersect1d(ids, theirs)
            if len(shared):
                raise DuplicateEntry(
                    f"segment {path} repeats {len(shared)} ids that are live already, such as "
                    f"{shared[0]}; every id must be unique (to replace an entry, remove the "
                    "old id in "
                    "the same commit)"
                )


def npy_bytes(rows: Int64Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()
