"""A store's past: the log, names for versions, tags, and domains as they once were."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from memory_server.errors import StoreDamaged, UnknownDomain, UnknownVersion
from memory_server.store.manifest import Manifest
from memory_server.store.names import VERSION_LENGTH, check_tag, is_prefix, is_tag, is_version
from memory_server.store.reader import StoreReader
from memory_server.store.storage import Storage

TAGS = "tags"
_BEFORE = re.compile(r"(.+?)~(\d{0,9})")


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One version of the log.

    Attributes:
        time: ISO 8601, UTC.
        tags: names that point to it, in order.
        collected: `gc` gave it up; it can no longer be read.
    """

    version: str
    parent: str | None
    time: str
    message: str
    entries: int
    tags: tuple[str, ...]
    collected: bool


def read_log(reader: StoreReader, start: str) -> Iterator[LogEntry]:
    """The versions from `start` back to the first, each as it is asked for."""
    collected = reader.collected()
    names: dict[str, list[str]] = {}
    for tag, tagged in read_tags(reader.storage).items():
        names.setdefault(tagged, []).append(tag)
    version: str | None = start
    while version is not None:
        gone = collected.get(version)
        found = gone or reader.manifest(version)
        yield LogEntry(
            version=version,
            parent=found.parent,
            time=found.time,
            message=found.message,
            entries=found.entries,
            tags=tuple(names.get(version, ())),
            collected=gone is not None,
        )
        version = found.parent


def kept_manifests(reader: StoreReader, start: str) -> Iterator[Manifest]:
    """The manifests from `start` back to the first, less those that `gc` gave up."""
    collected = reader.collected()
    version: str | None = start
    while version is not None:
        gone = collected.get(version)
        if gone is None:
            manifest = reader.manifest(version)
            yield manifest
            version = manifest.parent
        else:
            version = gone.parent


def resolve(reader: StoreReader, name: str) -> str:
    """The version that `name` means: HEAD, a tag, a version, the unique beginning of one (from
    four digits on), and any of these followed by ~n, for n versions before it.

    Raises:
        UnknownVersion: none, more than one, or `gc` gave it up.
    """
    if match := _BEFORE.fullmatch(name):
        return _ancestor(reader, resolve(reader, match[1]), int(match[2] or 1), name)
    if name == "HEAD":
        return reader.line.head()
    if is_version(name):
        return _committed(reader, name)
    if is_prefix(name):
        return _by_prefix(reader, name)
    tagged = read_tag(reader.storage, name) if is_tag(name) else None
    if tagged is None:
        raise UnknownVersion(
            f"the store {reader.storage.location} has no version or tag {name!r}; its head is "
            f"{reader.line.head()}, its tags are {', '.join(read_tags(reader.storage)) or 'none'}"
        )
    return tagged


def domain_source(
    reader: StoreReader, base: Manifest, domain: str, from_version: str | None
) -> Manifest:
    """The version that a domain is brought back from: the given, or the newest before `base`, or
    `base` itself, that plugs it.

    Raises:
        UnknownDomain: none does. UnknownVersion: see `resolve`.
    """
    if from_version is not None:
        manifest = reader.manifest(resolve(reader, from_version))
        if domain not in manifest.domains():
            raise UnknownDomain(
                f"version {manifest.version} has no domain {domain!r}; it has "
                f"{', '.join(sorted(manifest.domains())) or 'none'}"
            )
        return manifest
    seen: set[str] = set()
    for manifest in kept_manifests(reader, base.version):
        if domain in manifest.domains():
            return manifest
        seen |= manifest.domains().keys()
    raise UnknownDomain(
        f"no version of {reader.storage.location} has a domain {domain!r}; there were "
        f"{', '.join(sorted(seen)) or 'none'}"
    )


def next_id(reader: StoreReader, manifest: Manifest) -> int:
    """Above every id that the store ever held up to this version."""
    highest = -1
    for each in kept_manifests(reader, manifest.version):
        highest = max(highest, *(ref.max_id for ref in each.segments), -1)
        if each.next_id is not None:
            return max(each.next_id, highest + 1)
    return highest + 1


def read_tags(storage: Storage) -> dict[str, str]:
    """All tags, in the order of their names.

    Raises:
        StoreDamaged: names the tag's file.
    """
    found: dict[str, str] = {}
    for name in sorted(info.name for info in storage.list(TAGS)):
        if not is_tag(name):
            continue  # a temporary file, or none of ours
        version = read_tag(storage, name)
        if version is not None:
            found[name] = version
    return found


def read_tag(storage: Storage, name: str) -> str | None:
    """The version of a tag, or None when there is no such tag.

    Raises:
        StoreDamaged: its file does not hold a version. ValueError: no tag has such a name.
    """
    file = f"{TAGS}/{check_tag(name)}"
    try:
        data = storage.read(file)
    except FileNotFoundError:
        return None
    version = data[:VERSION_LENGTH].decode("ascii", "replace")
    if not is_version(version) or data != f"{version}\n".encode():
        raise StoreDamaged(
            f"{storage.location}/{file} does not hold a version; make the tag again (untag, tag)"
        )
    return version


def write_tag(reader: StoreReader, name: str, version: str, *, move: bool) -> None:
    """Point a tag to a version.

    Raises:
        ValueError: the tag is there (and not `move`), or cannot have this name. UnknownVersion:
            `gc` is just giving the version up.
    """
    storage, file, data = reader.storage, f"{TAGS}/{check_tag(name)}", f"{version}\n".encode()
    before: bytes | None = None
    storage.prepare((TAGS,))
    if move:
        with contextlib.suppress(FileNotFoundError):
            before = storage.read(file)
        storage.write(file, data)
    else:
        try:
            storage.create(file, data)
        except FileExistsError as error:
            raise ValueError(
                f"tag {name!r} names version {read_tag(storage, name)} already; untag it first, "
                "move it, or choose another name"
            ) from error
    # A collection looks at tags before and after its commit; one that missed this tag both times
    # has committed by now.
    if version in reader.collected():
        if before is None:
            storage.remove(file)
        else:
            storage.write(file, before)
        raise UnknownVersion(f"version {version} was just given up when garbage was collected")


def remove_tag(reader: StoreReader, name: str) -> None:
    """Forget a tag.

    Raises:
        UnknownVersion: there is none.
    """
    names = [info.name for info in reader.storage.list(TAGS)]
    if check_tag(name) not in names:
        raise UnknownVersion(
            f"the store {reader.storage.location} has no tag {name!r}; it has "
            f"{', '.join(sorted(filter(is_tag, names))) or 'none'}"
        )
    reader.storage.remove(f"{TAGS}/{name}")


def _committed(reader: StoreReader, version: str) -> str:
    """The version, if it is on the line: writers that died may have left manifests beside it."""
    gone = reader.collected().get(version)
    if gone is not None:
        raise UnknownVersion(
            f"version {version} of {gone.time[:16]} ({gone.message}) was given up when garbage was "
            f"collected from {reader.storage.location}; its head is {reader.line.head()}"
        )
    child = reader.line.child(reader.manifest(version).parent)
    if child == version:
        return version
    # Stores of before have no `next` files for their first versions.
    head = reader.line.head()
    if child is None and any(m.version == version for m in kept_manifests(reader, head)):
        return version
    raise UnknownVersion(
        f"version {version} was never committed to {reader.storage.location}; its head is {head}"
    )


def _ancestor(reader: StoreReader, version: str, steps: int, name: str) -> str:
    for step, entry in enumerate(read_log(reader, version)):
        if step == steps:
            if entry.collected:
                raise UnknownVersion(f"{name} is version {entry.version}, which gc gave up")
            return entry.version
    raise UnknownVersion(f"{name}: there are only {step} versions before {version}")


def _by_prefix(reader: StoreReader, prefix: str) -> str:
    head = reader.line.head()
    files = [info.name for info in reader.storage.list("manifests")]
    wanted = {f.removesuffix(".json") for f in files if f.startswith(prefix)}
    # Files alone do not say: a writer that lost, or died, may have left a manifest.
    found: list[str] = []
    for manifest in kept_manifests(reader, head) if wanted else ():
        if manifest.version in wanted:
            found.append(manifest.version)
            wanted.discard(manifest.version)
        if not wanted:
            break
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownVersion(
            f"{prefix!r} begins {len(found)} versions: {', '.join(sorted(found))}; give more digits"
        )
    raise UnknownVersion(
        f"no version of {reader.storage.location} begins with {prefix!r}; its head is {head}"
    )
