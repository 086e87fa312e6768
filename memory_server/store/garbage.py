"""Collection of garbage: old versions are given up, and files that no kept version names go.

Safe against writers without a lock and without trusting any clock: the collection is a commit of
its own. It lists what is there, works out what it may remove, and then commits a version with the
same content. A writer that began before fails with a conflict, whatever it had written; one that
begins after brings only files that are not in the list, because every commit's files have names of
their own, and takes nothing from a version that was given up, because it finds the record. Only
then is anything removed.

Readers are not asked. A version that a server still answers from, or may restart from, must be
among those kept: name it in `protect`, tag it, or keep enough versions.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from memory_server.errors import StoreFull
from memory_server.store.changes import Plan
from memory_server.store.collected import COLLECTED, Collected, dump_record, record_name
from memory_server.store.files import TEMPORARY_PREFIX
from memory_server.store.history import kept_manifests, next_id, read_tags
from memory_server.store.manifest import Manifest
from memory_server.store.publishing import DIRECTORIES, manifest_name, publish_plan
from memory_server.store.reader import StoreReader

log = logging.getLogger(__name__)

_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class GarbageReport:
    """What a collection removed, or would remove.

    Attributes:
        version: the version that it committed; None for a dry run, or when no version and no file
            of one was garbage.
        collected: the versions given up.
        files: names of the removed files.
        bytes: their size.
    """

    version: str | None
    collected: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


def collect_garbage(
    reader: StoreReader,
    *,
    keep_versions: int,
    min_age_s: float,
    protect: Collection[str],
    incoming_age_s: float,
    dry_run: bool,
) -> GarbageReport:
    """See `Store.gc`; `protect` are whole versions."""
    # Not `< 0`, which NaN passes.
    if keep_versions < 1 or not (min_age_s >= 0 and incoming_age_s >= 0):
        raise ValueError(
            f"keep_versions={keep_versions} must be at least 1, min_age_s={min_age_s} and "
            f"incoming_age_s={incoming_age_s} numbers of 0 or more"
        )
    storage = reader.storage
    head = reader.head_manifest()
    # All that is there, before the commit; nothing that appears later is touched.
    present = _present(reader)
    history = list(kept_manifests(reader, head.version))
    pinned = {*protect, *read_tags(storage).values()}
    kept = _kept(history, keep_versions, min_age_s, pinned)
    given_up = [manifest for manifest in history if manifest.version not in kept]
    rubbish = set(present) - _needed(history, kept)
    stale = _stale(reader, incoming_age_s)
    if dry_run:
        return _report(None, given_up, {**stale, **{name: present[name] for name in rubbish}})
    # These go by their age alone, and before the commit, which on a full disk needs their room.
    _remove(reader, stale)
    if not rubbish:
        return _report(None, given_up, stale)

    earlier = [info.name for info in storage.list(COLLECTED)]
    versions = {**reader.collected(), **{m.version: Collected.of(m) for m in given_up}}
    plan = Plan(base=head, segments=head.segments, next_id=next_id(reader, head))

    def remember(manifest: Manifest) -> list[str]:
        if not versions:
            return []
        data = dump_record(head.version, versions.values())
        storage.write(record_name(manifest.version), data)
        return [record_name(manifest.version)]

    # Should it lose against another writer: a record of what did not take place says nothing.
    try:
        version = publish_plan(reader, plan, message=_message(given_up), before_commit=remember)
    except StoreFull as error:
        unnamed = rubbish - _needed(history, {manifest.version for manifest in history})
        raise StoreFull(_how_to_make_room(reader, error, stale, unnamed, present)) from error
    # A tag that came while this collection did not look: its version stays after all.
    late = set(read_tags(storage).values()) & {manifest.version for manifest in given_up}
    if late:
        kept |= late
        given_up = [manifest for manifest in given_up if manifest.version not in late]
        remaining = [each for each in versions.values() if each.version not in late]
        storage.write(record_name(version), dump_record(head.version, remaining))
        rubbish -= _needed(history, kept)
    garbage = {name: present[name] for name in rubbish}
    _remove(reader, garbage)
    _remove(reader, [f"{COLLECTED}/{name}" for name in earlier])
    return _report(version, given_up, {**stale, **garbage})


def _kept(
    history: Sequence[Manifest], keep_versions: int, min_age_s: float, pinned: Collection[str]
) -> set[str]:
    """The versions that stay, of a history with the newest first: pure but for the clock."""
    newest = time.time() - min_age_s
    return {
        manifest.version
        for position, manifest in enumerate(history)
        if position < keep_versions
        or manifest.version in pinned
        or datetime.fromisoformat(manifest.time).timestamp() > newest
    }


def _needed(history: Iterable[Manifest], kept: Collection[str]) -> set[str]:
    """The files that the kept versions name."""
    needed = set()
    for manifest in history:
        if manifest.version in kept:
            needed.add(manifest_name(manifest.version))
            for ref in manifest.segments:
                needed.add(f"segments/{ref.file}")
                if ref.deletions is not None:
                    needed.add(f"deletions/{ref.deletions}")
    return needed


def _present(reader: StoreReader) -> dict[str, int]:
    """Files of versions, whole ones, and their sizes."""
    return {
        f"{directory}/{info.name}": info.bytes
        for directory in ("manifests", "deletions", "segments")
        for info in reader.storage.list(directory)
        if not info.name.startswith(TEMPORARY_PREFIX)
    }


def _stale(reader: StoreReader, age_s: float) -> dict[str, int]:
    """What writers left half done, by its age: temporary files, and segments never adopted."""
    oldest = time.time() - age_s
    found = {}
    for directory in (*DIRECTORIES, "."):
        for info in reader.storage.list(directory):
            old = info.modified_s is not None and info.modified_s < oldest
            if old and info.name.startswith(TEMPORARY_PREFIX):
                found[f"{directory}/{info.name}"] = info.bytes
    incoming = reader.storage.incoming
    if incoming.is_dir():
        for path in incoming.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file() and stat.st_mtime < oldest:
                found[f"incoming/{path.name}"] = stat.st_size
    return found


def _remove(reader: StoreReader, names: Iterable[str]) -> None:
    """Manifests first: a version must not outlive its files."""
    for name in sorted(names, key=lambda name: (not name.startswith("manifests/"), name)):
        if name.startswith("incoming/"):
            path = reader.storage.incoming / name.removeprefix("incoming/")
            reader.storage.remove_incoming(path)
        else:
            reader.storage.remove(name)


def _how_to_make_room(
    reader: StoreReader,
    error: StoreFull,
    stale: Collection[str],
    unnamed: Collection[str],
    sizes: Mapping[str, int],
) -> str:
    """What a person can do who has no room for a collection's own commit.

    Args:
        stale: what is removed already. unnamed: files that no version names, which only this
            person can tell from those of a writer that is still at work.
    """
    removed = f"; {len(stale)} old temporary files are removed already" if stale else ""
    if not unnamed:
        return (
            f"{error} (the collection is a version too, and needs a few kilobytes on the disk "
            f"before it can remove anything{removed})"
        )
    largest = sorted(unnamed, key=lambda name: (-sizes[name], name))
    shown = ", ".join(reader.where(name) for name in largest[:_NAMED])
    more = f" and {len(largest) - _NAMED} more" if len(largest) > _NAMED else ""
    return (
        f"{error}; or, if no other process writes to this store, remove by hand what no version "
        f"names ({sum(sizes[name] for name in largest):,} bytes): {shown}{more}{removed}"
    )


def _message(given_up: Sequence[Manifest]) -> str:
    count = len(given_up)
    return f"garbage collected: {count} version{'' if count == 1 else 's'} given up"


def _report(
    version: str | None, given_up: Sequence[Manifest], sizes: dict[str, int]
) -> GarbageReport:
    return GarbageReport(
        version=version,
        collected=tuple(manifest.version for manifest in given_up),
        files=tuple(sorted(sizes)),
        bytes=sum(sizes.values()),
    )
