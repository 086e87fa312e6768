"""Content versions: immutable JSON manifests, each with a parent, a time and a message, like
commits.

A manifest is small: a segment's ids and a large set of removed rows live in files of their own,
which it names. Its version is the hash of what it says, so an altered manifest is noticed when it
is read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from memory_server.errors import StoreDamaged, UnknownDomain
from memory_server.store.names import VERSION_LENGTH, checksum_in, is_version

# Fields that manifests of before do not have; a version without them hashes as it did then.
_LATER_REF_FIELDS = ("min_doc_id", "max_doc_id")


@dataclass(frozen=True, kw_only=True)
class SegmentRef:
    """A segment as one version plugs it.

    Attributes:
        file: name below `segments/`.
        deletions: name below `deletions/` of the removed rows (int64, ascending), or None.
        deleted: how many rows are removed.
        min_doc_id, max_doc_id: range of its documents, or None in a manifest of before.
    """

    file: str
    domain: str
    rows: int
    bytes: int
    sha256: str
    min_id: int
    max_id: int
    deletions: str | None = None
    deleted: int = 0
    min_doc_id: int | None = None
    max_doc_id: int | None = None

    @property
    def live(self) -> int:
        """Rows that are not removed."""
        return self.rows - self.deleted


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One content version. `segments` is in the order in which rows are dealt to shards.

    Attributes:
        next_id: above every id that the store ever held, in domains that are unplugged too; None
            in a manifest of before.
        nonce: makes two writers' manifests different, whatever they say.
    """

    version: str
    parent: str | None
    time: str
    message: str
    segments: tuple[SegmentRef, ...]
    next_id: int | None = None
    nonce: str | None = None

    @property
    def entries(self) -> int:
        """Live entries."""
        return sum(ref.live for ref in self.segments)

    def domains(self) -> dict[str, int]:
        """Live entries of each plugged domain, in the manifest's order."""
        counts: Counter[str] = Counter()
        for ref in self.segments:
            counts[ref.domain] += ref.live
        return dict(counts)

    def of_domains(self, names: Collection[str]) -> tuple[SegmentRef, ...]:
        """The segments of these domains, in the manifest's order; of all if none is named.

        Raises:
            UnknownDomain: one is not plugged; names those that are.
        """
        check_domains(self.version, self.segments, names)
        return tuple(ref for ref in self.segments if not names or ref.domain in names)


def check_domains(version: str, segments: Iterable[SegmentRef], names: Collection[str]) -> None:
    """Raises UnknownDomain: a version of these segments has not all of these domains."""
    plugged = {ref.domain for ref in segments}
    unknown = [name for name in names if name not in plugged]
    if unknown:
        raise UnknownDomain(
            f"version {version} has no domain {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(plugged)) or 'none'}"
        )


def new_manifest(
    *,
    parent: str | None,
    time: str,
    message: str,
    segments: tuple[SegmentRef, ...],
    next_id: int | None = None,
    nonce: str | None = None,
) -> Manifest:
    """Make a manifest, whose version follows from the rest."""
    fields: dict[str, Any] = {
        "parent": parent,
        "time": time,
        "message": message,
        "segments": segments,
        "next_id": next_id,
        "nonce": nonce,
    }
    version = _version(_body(Manifest(version="", **fields)))
    return Manifest(version=version, **fields)


def dump_manifest(manifest: Manifest) -> bytes:
    return (json.dumps({"version": manifest.version, **_body(manifest)}, indent=1) + "\n").encode()


def parse_manifest(data: bytes, *, version: str, where: str) -> Manifest:
    """Read a manifest back.

    Args:
        version: the one that its name gives.
        where: the file, for messages.

    Raises:
        StoreDamaged: it is not whole, does not say what its version was made from, or names a file
            that is not the store's.
    """
    try:
        raw = json.loads(data)
        segments = tuple(SegmentRef(**ref) for ref in raw["segments"])
        manifest = new_manifest(
            parent=raw["parent"],
            time=raw["time"],
            message=raw["message"],
            segments=segments,
            next_id=raw.get("next_id"),
            nonce=raw.get("nonce"),
        )
        stored = raw["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamaged(
            f"manifest {where} is damaged: {error!r}; restore it from a copy"
        ) from error
    if manifest.version != stored or manifest.version != version:
        raise StoreDamaged(
            f"manifest {where} was altered: its content hashes to {manifest.version}; "
            "restore it from a copy"
        )
    _refuse_foreign_names(manifest, where)
    return manifest


def _refuse_foreign_names(manifest: Manifest, where: str) -> None:
    names = [("segments", ref.file, "arrow") for ref in manifest.segments]
    names += [
        ("deletions", ref.deletions, "npy")
        for ref in manifest.segments
        if ref.deletions is not None
    ]
    for directory, name, kind in names:
        if not isinstance(name, str) or checksum_in(name, kind) is None:
            raise StoreDamaged(
                f"manifest {where} names {name!r}, which is no file of the store's {directory}; "
                "it was not written by this program: do not use this store"
            )
    if manifest.parent is not None and not is_version(manifest.parent):
        raise StoreDamaged(f"manifest {where} names {manifest.parent!r} as its parent version")


def _body(manifest: Manifest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "parent": manifest.parent,
        "time": manifest.time,
        "message": manifest.message,
        "segments": [_ref_body(ref) for ref in manifest.segments],
    }
    for name in ("next_id", "nonce"):
        if getattr(manifest, name) is not None:
            body[name] = getattr(manifest, name)
    return body


def _ref_body(ref: SegmentRef) -> dict[str, Any]:
    fields = asdict(ref)
    return {
        name: value
        for name, value in fields.items()
        if value is not None or name not in _LATER_REF_FIELDS
    }


def _version(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:VERSION_LENGTH]
