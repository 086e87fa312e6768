"""Fewer, larger segments with the same entries: removed rows go, small segments become one."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from memory_server.errors import UnknownDomain
from memory_server.store.changes import Plan
from memory_server.store.history import next_id
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.names import new_nonce, planned_name
from memory_server.store.publishing import publish_plan
from memory_server.store.reader import StoreReader
from memory_server.store.segments import segment_schema, sha256_of, write_batch
from memory_server.store.storage import made_incoming

TARGET_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What a compaction did, or would do.

    Attributes:
        version: the new version; None for a dry run, or when nothing was to do.
        segments_before, segments_after: of the whole version.
        rows_dropped: removed rows that no longer take room (once `gc` has swept).
        bytes_written: of new segments; 0 for a dry run.
    """

    version: str | None
    segments_before: int
    segments_after: int
    rows_dropped: int
    bytes_written: int


def compact_store(
    reader: StoreReader,
    *,
    domains: Collection[str] | None,
    target_rows: int,
    message: str | None,
    dry_run: bool,
) -> Compaction:
    """See `Store.compact`."""
    base = reader.head_manifest()
    groups = groups_to_rewrite(base.segments, target_rows=target_rows, domains=domains)
    refs = [base.segments[position] for group in groups for position in group]
    before, after = len(base.segments), len(base.segments) - len(refs) + len(groups)
    dropped = sum(ref.deleted for ref in refs)
    version, written = None, 0
    if groups and not dry_run:
        nonce = new_nonce()
        reader.storage.check_writable()
        reader.storage.prepare(())
        files: list[tuple[Path, str]] = []
        try:
            segments = rewritten(reader, base, groups, nonce=nonce, files=files)
            plan = Plan(
                base=base,
                segments=segments,
                next_id=next_id(reader, base),
                additions=tuple(files),
            )
            text = message or f"compacted {len(refs)} segments into {len(groups)}"
            version = publish_plan(reader, plan, message=text)
        finally:
            for path, _ in files:
                with contextlib.suppress(OSError):
                    reader.storage.remove_incoming(path)
        names = {name for _, name in files}
        written = sum(ref.bytes for ref in segments if ref.file in names)
    return Compaction(
        version=version,
        segments_before=before,
        segments_after=after,
        rows_dropped=dropped,
        bytes_written=written,
    )


def groups_to_rewrite(
    segments: Sequence[SegmentRef], *, target_rows: int, domains: Collection[str] | None
) -> list[list[int]]:
    """Which segments become one, by their positions: pure.

    Within a domain, in order: segments with removed rows and those below half of `target_rows`, as
    many together as fit into `target_rows`. One that is whole and has no partner is left alone.

    Raises:
        ValueError: target_rows is below 1. UnknownDomain: no such domain.
    """
    if target_rows < 1:
        raise ValueError(f"target_rows={target_rows} must be at least 1")
    plugged = dict.fromkeys(ref.domain for ref in segments)
    for name in domains or ():
        if name not in plugged:
            raise UnknownDomain(f"no domain {name!r}; there are {', '.join(plugged) or 'none'}")
    groups = []
    for domain in plugged if domains is None else dict.fromkeys(domains):
        group: list[int] = []
        rows = 0
        for position, ref in enumerate(segments):
            if ref.domain != domain or (not ref.deleted and 2 * ref.live >= target_rows):
                continue
            if group and rows + ref.live > target_rows:
                groups.append(group)
                group, rows = [], 0
            group.append(position)
            rows += ref.live
        groups.append(group)
    return [
        group
        for group in groups
        if len(group) > 1 or any(segments[position].deleted for position in group)
    ]


def rewritten(
    reader: StoreReader,
    base: Manifest,
    groups: Sequence[Sequence[int]],
    *,
    nonce: str,
    files: list[tuple[Path, str]],
) -> tuple[SegmentRef, ...]:
    """Write each group as one segment into the store's `incoming`, in memory one at a time.

    Args:
        files: gets the local files, with the names that they will have.

    Returns:
        The new version's segments.
    """
    segments: list[SegmentRef | None] = list(base.segments)
    for number, group in enumerate(groups):
        refs = [base.segments[position] for position in group]
        path = made_incoming(reader.storage) / f"compact-{nonce}-{number}.arrow"
        ref = _joined(reader, refs, path)
        files.append((path, ref.file))
        for position in group:
            segments[position] = None
        segments[group[0]] = ref
    return tuple(ref for ref in segments if ref is not None)


def _joined(reader: StoreReader, refs: Sequence[SegmentRef], path: Path) -> SegmentRef:
    for ref in refs:
        if sha256_of(reader.segment(ref).path) != ref.sha256:
            reader.verify_segment(ref)  # damage must not be copied under a right checksum
    batches = [reader.segment(ref).batch(reader.live_rows(ref)) for ref in refs]
    batch = pa.concat_batches(batches) if len(batches) > 1 else batches[0]
    schema = segment_schema(reader.meta)
    info = write_batch(
        path, batch.replace_schema_metadata(schema.metadata), files=reader.storage.files
    )
    doc_ids = batch.column("doc_id").to_numpy(zero_copy_only=True)
    return SegmentRef(
        file=planned_name(info.sha256, "arrow"),
        domain=refs[0].domain,
        min_doc_id=int(doc_ids.min()),
        max_doc_id=int(doc_ids.max()),
        **asdict(info),
    )
