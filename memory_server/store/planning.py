"""A change worked out against one version, and checked, before anything is written.

Of what stays, only segments whose range of ids or documents meets the change are read; of a domain
that goes, nothing is.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from memory_server.errors import (
    DomainPlugged,
    TokenizerMismatch,
    UnknownDomain,
    UnknownEntry,
)
from memory_server.store.changes import SAMPLE, Addition, Change, DomainChange, Plan
from memory_server.store.id_rows import rows_with
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.names import planned_name
from memory_server.store.reader import StoreReader
from memory_server.store.segments import Int64Array, Segment, refuse_duplicates, refuse_too_large
from memory_server.store.unique_ids import refuse_known_ids, refuse_plugged_ids


def make_plan(
    reader: StoreReader,
    base: Manifest,
    change: Change,
    *,
    sources: Mapping[str, Manifest],
    next_id: int,
) -> Plan:
    """What `change` comes to on `base`. Writes nothing.

    Args:
        sources: for each domain of `change.plugs()`, the version that it is brought back from.
        next_id: above every id that the store held up to `base`.

    Raises:
        UnknownEntry, UnknownDomain, DomainPlugged, DuplicateEntry, TokenizerMismatch,
        StoreDamaged, ValueError: refused.
    """
    dropped = _dropped(base, change)
    stays = [ref for ref in base.segments if ref.domain not in dropped]
    goes = [ref for ref in base.segments if ref.domain in dropped]
    added = [_reference(reader, addition) for addition in change.add]
    paths = [Path(addition.path) for addition in change.add]
    plugged = [
        ref
        for plug in change.plugs()
        for ref in sources[plug.domain].segments
        if ref.domain == plug.domain
    ]
    removal = _Removal(reader, change, added, paths)
    kept = [removal.without(ref) for ref in stays]
    removal.refuse_unknown(base, goes)
    refuse_known_ids(reader, kept, removal.deletions, added, paths)
    refuse_plugged_ids(
        reader, kept, removal.deletions, plugged, [*added], paths, list(sources.values())
    )
    segments = (
        *(ref for ref in kept if ref.live),
        *plugged,
        *(ref for ref in added if ref.rows),
    )
    live = {ref.deletions for ref in segments}
    deletions = {name: rows for name, rows in removal.deletions.items() if name in live}
    return Plan(
        base=base,
        segments=segments,
        next_id=max(next_id, *(ref.max_id + 1 for ref in segments), 0),
        additions=tuple(
            (path, ref.file) for path, ref in zip(paths, added, strict=True) if ref.rows
        ),
        deletions=deletions,
        domains=_domain_changes(base, segments, [*added, *plugged], goes, removal.per_domain),
        replaced=removal.replaced(),
        added_sample=_sample([Segment(path).ids for path in paths]),
        removed_sample=_sample(removal.found),
        bytes_to_write=sum(ref.bytes for ref in added if ref.rows)
        + sum(len(npy_bytes(rows)) for rows in deletions.values()),
    )


def npy_bytes(rows: Int64Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


class _Removal:
    """The rows that go from segments that stay, and a book of which ids were found."""

    def __init__(
        self,
        reader: StoreReader,
        change: Change,
        added: Sequence[SegmentRef],
        paths: Sequence[Path],
    ) -> None:
        self._reader = reader
        self._ids, self._doc_ids = change.remove_ids, change.remove_doc_ids
        self._new_ids = [Segment(path).ids for path in paths]
        self._replacing: Int64Array = np.empty(0, dtype=np.int64)
        if change.replace and self._new_ids:
            self._replacing = np.sort(np.concatenate(self._new_ids))
        self._seen_ids: list[Int64Array] = []
        self._seen_doc_ids: list[Int64Array] = []
        self.found: list[Int64Array] = []
        self.deletions: dict[str, Int64Array] = {}
        self.per_domain: Counter[str] = Counter()

    def without(self, ref: SegmentRef) -> SegmentRef:
        """The segment as the new version plugs it."""
        rows = self._rows(ref)
        if not len(rows):
            return ref
        gone = np.union1d(self._reader.deleted_rows(ref), rows).astype(np.int64)
        self.found.append(self._reader.segment(ref).ids[rows])
        self.per_domain[ref.domain] += len(rows)
        name = planned_name(sha256(npy_bytes(gone)).hexdigest(), "npy")
        self.deletions[name] = gone
        return replace(ref, deletions=name, deleted=len(gone))

    def refuse_unknown(self, base: Manifest, goes: Sequence[SegmentRef]) -> None:
        """Refuse ids that were not live; those of a domain that goes are fine.

        Raises:
            UnknownEntry: names some.
        """
        missing, missing_docs = self._missing()
        for ref in goes:
            if len(missing) or len(missing_docs):
                self._rows(ref)
                missing, missing_docs = self._missing()
        for what, absent in (("ids", missing), ("doc_ids", missing_docs)):
            if len(absent):
                raise UnknownEntry(
                    f"cannot remove {len(absent)} {what} that version {base.version} does not "
                    f"hold: {', '.join(str(i) for i in absent[:5])}"
                    f"{', …' if len(absent) > 5 else ''}"
                )

    def replaced(self) -> int:
        """How many removed ids come back with what is added."""
        if not self.found:
            return 0
        gone = np.sort(np.concatenate(self.found))
        return sum(len(rows_with(ids, gone)) for ids in self._new_ids)

    def _rows(self, ref: SegmentRef) -> Int64Array:
        """Live rows of a segment that the change names."""
        by_id = _within(self._ids, ref.min_id, ref.max_id)
        replacing = _within(self._replacing, ref.min_id, ref.max_id)
        by_doc = _within(self._doc_ids, ref.min_doc_id, ref.max_doc_id)
        if not (len(by_id) or len(replacing) or len(by_doc)):
            return np.empty(0, dtype=np.int64)
        segment, dead = self._reader.segment(ref), self._reader.deleted_rows(ref)
        named = np.setdiff1d(rows_with(segment.ids, by_id), dead, assume_unique=True)
        self._seen_ids.append(segment.ids[named])
        of_docs = np.setdiff1d(rows_with(segment.doc_ids, by_doc), dead, assume_unique=True)
        self._seen_doc_ids.append(np.unique(segment.doc_ids[of_docs]))
        taken = np.setdiff1d(rows_with(segment.ids, replacing), dead, assume_unique=True)
        return np.union1d(np.union1d(named, of_docs), taken).astype(np.int64)

    def _missing(self) -> tuple[Int64Array, Int64Array]:
        return (
            np.setdiff1d(self._ids, np.concatenate([self._ids[:0], *self._seen_ids])),
            np.setdiff1d(self._doc_ids, np.concatenate([self._ids[:0], *self._seen_doc_ids])),
        )


def _dropped(base: Manifest, change: Change) -> set[str]:
    live = base.domains()
    dropped = set(change.dropped_domains)
    unknown = [name for name in change.dropped_domains if name not in live]
    if unknown:
        raise UnknownDomain(
            f"version {base.version} has no domain {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(live)) or 'none'}"
        )
    coming = [plug.domain for plug in change.plugs()] + [new for _, new in change.swap]
    for name in coming:
        if name in live and name not in dropped:
            raise DomainPlugged(
                f"domain {name!r} is plugged already with {live[name]:,} entries; unplug it in the "
                "same change, or choose another name"
            )
    return dropped


def _reference(reader: StoreReader, addition: Addition) -> SegmentRef:
    """A segment file as this store's, after every check that one file needs."""
    path, where = addition.path, reader.storage.location
    segment = Segment(path)
    theirs, ours = segment.meta, reader.meta
    if theirs.tokenizer_fingerprint != ours.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"segment {path} was tokenised by {theirs.tokenizer_fingerprint}, the store {where} "
            f"by {ours.tokenizer_fingerprint}; tokenise the text again with the store's tokenizer"
        )
    if theirs != ours:
        raise ValueError(
            f"segment {path} has entry_tokens={theirs.entry_tokens}, "
            f"vocab_size={theirs.vocab_size}, pad_token_id={theirs.pad_token_id}, but the store "
            f"{where} needs {ours.entry_tokens}, {ours.vocab_size}, {ours.pad_token_id}; write "
            "the segment again"
        )
    if segment.rows and (segment.tokens.max() >= ours.vocab_size or segment.tokens.min() < 0):
        raise ValueError(
            f"segment {path} has token ids outside of [0, {ours.vocab_size}); write it again"
        )
    refuse_duplicates(segment.ids, f"segment {path}")
    info = segment.info
    if info.min_id < 0 and info.rows:
        raise ValueError(f"segment {path} has ids below 0, such as {info.min_id}; write it again")
    for name, given in (("ids", segment.ids), ("doc_ids", segment.doc_ids)):
        refuse_too_large(given, f"segment {path}: {name}")
    return SegmentRef(
        file=planned_name(info.sha256, "arrow"),
        domain=addition.domain,
        min_doc_id=int(segment.doc_ids.min()) if segment.rows else -1,
        max_doc_id=int(segment.doc_ids.max()) if segment.rows else -1,
        **asdict(info),
    )


def _within(values: Int64Array, low: int | None, high: int | None) -> Int64Array:
    """Of ascending values, those in the range; all of them when it is not known."""
    if low is None or high is None:
        return values
    return values[np.searchsorted(values, low) : np.searchsorted(values, high, side="right")]


def _sample(arrays: Sequence[Int64Array]) -> Int64Array:
    shown = [np.sort(array[:SAMPLE]) for array in arrays]
    return np.concatenate([np.empty(0, dtype=np.int64), *shown])[:SAMPLE]


def _domain_changes(
    base: Manifest,
    segments: Sequence[SegmentRef],
    coming: Sequence[SegmentRef],
    goes: Sequence[SegmentRef],
    removed: Mapping[str, int],
) -> dict[str, DomainChange]:
    added: Counter[str] = Counter()
    gone: Counter[str] = Counter(removed)
    before, after = Counter(base.domains()), Counter[str]()
    for ref in coming:
        added[ref.domain] += ref.live
    for ref in goes:
        gone[ref.domain] += ref.live
    for ref in segments:
        after[ref.domain] += ref.live
    return {
        name: DomainChange(
            before=before[name], after=after[name], added=added[name], removed=gone[name]
        )
        for name in sorted(added.keys() | gone.keys())
    }
