"""Every byte of a store compared with what was written: all damage, not the first."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from memory_server.errors import MemoryServerError, StoreDamaged
from memory_server.store.history import TAGS, kept_manifests, read_tag
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.names import is_tag
from memory_server.store.publishing import manifest_name
from memory_server.store.reader import StoreReader

T = TypeVar("T")

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file, and what is wrong with it."""

    file: str
    reason: str


def find_damage(reader: StoreReader, versions: Iterable[str]) -> list[Damage]:
    """What is wrong with the files that these versions name; each file is read once."""
    found: list[Damage] = []
    manifests: list[Manifest] = []
    for version in versions:
        look = partial(reader.manifest, version)
        manifest = _tried(found, manifest_name(version), look)
        if manifest is not None:
            manifests.append(manifest)
    return found + _damaged_files(reader, manifests)


def find_all_damage(reader: StoreReader) -> list[Damage]:
    """What is wrong with anything that can be reached: HEAD, the line, tags, and all versions."""
    found: list[Damage] = []
    _tried(found, "HEAD", reader.line.head)
    versions = _tried(found, "next", partial(_reachable, reader)) or []
    for info in reader.storage.list(TAGS):
        if is_tag(info.name):
            _tried(found, f"{TAGS}/{info.name}", partial(_check_tag, reader, info.name))
    return found + find_damage(reader, versions)


def _reachable(reader: StoreReader) -> list[str]:
    """The versions of the line that `gc` did not give up, also those behind a damaged manifest."""
    collected = reader.collected()
    versions: dict[str, None] = {}
    version = reader.line.child(None)
    while version is not None:
        versions[version] = None
        version = reader.line.child(version)
    if not versions:  # a store of before says its first versions only from child to parent
        with contextlib.suppress(MemoryServerError):  # the damaged one is found again below
            for manifest in kept_manifests(reader, reader.line.head()):
                versions[manifest.version] = None
                if manifest.parent is not None:
                    versions[manifest.parent] = None
    return [version for version in versions if version not in collected]


def refuse_damage(reader: StoreReader, damage: list[Damage]) -> None:
    """Raise StoreDamaged when there is any, with all files in its message."""
    if not damage:
        return
    if len(damage) == 1:
        raise StoreDamaged(damage[0].reason)
    shown = "".join(f"\n  {each.file}: {each.reason}" for each in damage[:_SHOWN])
    more = f"\n  and {len(damage) - _SHOWN} more" if len(damage) > _SHOWN else ""
    raise StoreDamaged(
        f"{len(damage)} files of {reader.storage.location} are damaged:{shown}{more}"
    )


def _damaged_files(reader: StoreReader, manifests: Iterable[Manifest]) -> list[Damage]:
    segments: dict[str, SegmentRef] = {}
    deletions: dict[str, SegmentRef] = {}
    for manifest in manifests:
        for ref in manifest.segments:
            segments.setdefault(ref.file, ref)
            if ref.deletions is not None:
                deletions.setdefault(ref.deletions, ref)
    found: list[Damage] = []
    for file, ref in segments.items():
        _tried(found, f"segments/{file}", partial(_check_segment, reader, ref))
    for file, ref in deletions.items():
        _tried(found, f"deletions/{file}", partial(_check_deletions, reader, ref))
    return found


def _check_segment(reader: StoreReader, ref: SegmentRef) -> None:
    reader.verify_segment(ref)
    ids = reader.segment(ref).ids
    if len(ids) and (int(ids.min()), int(ids.max())) != (ref.min_id, ref.max_id):
        raise StoreDamaged(
            f"segment {ref.file} has ids from {ids.min()} to {ids.max()}, its manifest says "
            f"{ref.min_id} to {ref.max_id}"
        )


def _check_deletions(reader: StoreReader, ref: SegmentRef) -> None:
    rows = reader.deleted_rows(ref)
    in_range = len(rows) == 0 or (rows[0] >= 0 and rows[-1] < ref.rows)
    if len(rows) != ref.deleted or not in_range or bool(np.any(np.diff(rows) <= 0)):
        raise StoreDamaged(
            f"deletions {ref.deletions} hold {len(rows)} rows that are not {ref.deleted} ascending "
            f"ones of a segment with {ref.rows}"
        )


def _check_tag(reader: StoreReader, name: str) -> None:
    version = read_tag(reader.storage, name)
    if version is not None:
        reader.manifest(version)


def _tried(found: list[Damage], file: str, look: Callable[[], T]) -> T | None:
    try:
        return look()
    except (MemoryServerError, OSError, ValueError) as error:
        found.append(Damage(file=file, reason=str(error)))
        return None
