"""What is remembered of versions that `gc` gave up: when they were and what they said.

A record is `collected/<version>.json`, named after the version that the collection committed. It
counts only once that version is on the line, so that a collection that lost against another writer,
or died, gave nothing up.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Self

from memory_server.errors import StoreDamaged
from memory_server.store.described import dump_checked, parse_checked
from memory_server.store.manifest import Manifest
from memory_server.store.names import is_version
from memory_server.store.storage import Storage
from memory_server.store.version_line import VersionLine

COLLECTED = "collected"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A version whose manifest, and files of its own, are gone or about to go."""

    version: str
    parent: str | None
    time: str
    message: str
    entries: int

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        return cls(
            version=manifest.version,
            parent=manifest.parent,
            time=manifest.time,
            message=manifest.message,
            entries=manifest.entries,
        )


def record_name(version: str) -> str:
    return f"{COLLECTED}/{version}.json"


def dump_record(parent: str, versions: Iterable[Collected]) -> bytes:
    """A record of the collection that commits on `parent`."""
    return dump_checked({"parent": parent, "versions": [asdict(each) for each in versions]})


def read_collected(storage: Storage, line: VersionLine) -> dict[str, Collected]:
    """All versions given up by collections that took place.

    Raises:
        StoreDamaged: names the record.
    """
    while True:
        try:
            return _read_all(storage, line)
        except FileNotFoundError:  # a later collection has just merged a record into its own
            continue


def _read_all(storage: Storage, line: VersionLine) -> dict[str, Collected]:
    found: dict[str, Collected] = {}
    for info in storage.list(COLLECTED):
        by = info.name.removesuffix(".json")
        if not is_version(by) or not info.name.endswith(".json"):
            continue  # a temporary file
        name = record_name(by)
        raw = parse_checked(storage.read(name), f"{storage.location}/{name}")
        try:
            versions = [Collected(**each) for each in raw["versions"]]
            took_place = line.child(raw["parent"]) == by
        except (KeyError, TypeError) as error:
            raise StoreDamaged(
                f"{storage.location}/{name} is damaged: {error!r}; restore it from a copy"
            ) from error
        if took_place:
            found.update({each.version: each for each in versions})
    return found
