"""A plan carried out: files first, then the one step that makes the new version visible.

What fails before that step leaves the version before; what fails after it leaves the new one. A
process that dies may leave files that no version names, for `gc` to sweep.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from memory_server.errors import StoreConflict, StoreError, StoreFull, StoreReadOnly
from memory_server.store.changes import Plan
from memory_server.store.manifest import Manifest, dump_manifest, new_manifest
from memory_server.store.names import check_message, new_nonce, own_name
from memory_server.store.planning import npy_bytes
from memory_server.store.reader import StoreReader

log = logging.getLogger(__name__)

DIRECTORIES = ("segments", "deletions", "manifests", "next", "tags", "collected")


def publish_plan(
    reader: StoreReader,
    plan: Plan,
    *,
    message: str,
    before_commit: Callable[[Manifest], Sequence[str]] | None = None,
) -> str:
    """Commit a plan. Returns the new version, which is now the head.

    Args:
        before_commit: called with the manifest when all is durable, just before it is visible;
            returns the names of files that it wrote for this version alone.

    Raises:
        StoreConflict: another writer committed since the plan was made. StoreFull: no room.
        StoreReadOnly: the filesystem cannot decide between rival writers. Nothing changed.
        ValueError, TypeError: no message.
    """
    check_message(message)
    storage = reader.storage
    reader.line.refuse_conflict(plan.parent)
    storage.check_writable()
    storage.prepare(DIRECTORIES)
    nonce = new_nonce()
    plan = _owned(plan, nonce)
    manifest = new_manifest(
        parent=plan.parent,
        time=now(),
        message=message,
        segments=plan.segments,
        next_id=plan.next_id,
        nonce=nonce,
    )
    written: list[str] = []
    try:
        for file, rows in plan.deletions.items():
            written.append(f"deletions/{file}")
            storage.write(written[-1], npy_bytes(rows))
        for source, file in plan.additions:
            written.append(f"segments/{file}")
            storage.adopt(source, written[-1], share=_is_ours(reader, source))
        written.append(manifest_name(manifest.version))
        storage.write(written[-1], dump_manifest(manifest))
        if before_commit is not None:
            written += before_commit(manifest)
    except BaseException:
        _sweep(reader, written)
        raise
    try:
        reader.line.append(plan.parent, manifest.version)
    except StoreConflict:
        _sweep(reader, written)
        raise
    except (StoreFull, StoreReadOnly):
        # Both come before the name is there. Of any other error that is not known, so that what
        # is written must stay: a request may take effect after its answer was lost.
        if reader.line.child(plan.parent) != manifest.version:
            _sweep(reader, written)
        raise
    for source, _ in plan.additions:
        if _is_ours(reader, source):
            with contextlib.suppress(OSError):
                storage.remove_incoming(source)
    return manifest.version


def manifest_name(version: str) -> str:
    return f"manifests/{version}.json"


def now() -> str:
    """The time as manifests give it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _owned(plan: Plan, nonce: str) -> Plan:
    """The plan with names of this publication alone: were it published twice at once, the one that
    loses must not sweep the winner's files."""
    names = {name: own_name(name, nonce) for name in plan.deletions}
    names |= {name: own_name(name, nonce) for _, name in plan.additions}
    segments = tuple(
        replace(
            ref,
            file=names.get(ref.file, ref.file),
            deletions=ref.deletions and names.get(ref.deletions, ref.deletions),
        )
        for ref in plan.segments
    )
    return replace(
        plan,
        segments=segments,
        additions=tuple((path, names[name]) for path, name in plan.additions),
        deletions={names[name]: rows for name, rows in plan.deletions.items()},
    )


def _is_ours(reader: StoreReader, source: Path) -> bool:
    return source.resolve().parent == reader.storage.incoming.resolve()


def _sweep(reader: StoreReader, names: list[str]) -> None:
    """Remove this commit's own files, which nobody else names; what stays is left to `gc`."""
    for name in names:
        try:
            reader.storage.remove(name)
        except (OSError, StoreError) as error:
            log.info("%s stays until gc: %s", reader.where(name), error)
