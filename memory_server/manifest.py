"""Content versions: immutable JSON manifests, each with a parent, a time and a message, like
commits.

A manifest is small: a segment's ids and a large set of removed rows live in files of their own,
which it names. Its version is the hash of what it says, so an altered manifest is noticed when it
is read.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory_server.errors import StoreDamaged

VERSION_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class SegmentRef:
    """A segment as one version plugs it.

    Attributes:
        file: name below `segments/`.
        deletions: name below `deletions/` of the removed rows (int64, ascending), or None.
        deleted: how many rows are removed.
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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One content version. `segments` is in the order in which rows are dealt to shards."""

    version: str
    parent: str | None
    time: str
    message: str
    segments: tuple[SegmentRef, ...]

    @property
    def entries(self) -> int:
        """Live entries."""
        return sum(ref.rows - ref.deleted for ref in self.segments)


def new_manifest(
    *, parent: str | None, time: str, message: str, segments: tuple[SegmentRef, ...]
) -> Manifest:
    """Make a manifest, whose version follows from the rest."""
    body = _body(parent, time, message, segments)
    return Manifest(
        version=_version(body), parent=parent, time=time, message=message, segments=segments
    )


def dump_manifest(manifest: Manifest) -> bytes:
    body = _body(manifest.parent, manifest.time, manifest.message, manifest.segments)
    return (json.dumps({"version": manifest.version, **body}, indent=1) + "\n").encode()


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Read a manifest back.

    Raises:
        StoreDamaged: it is not whole, or does not say what its version was made from.
    """
    try:
        raw = json.loads(data)
        segments = tuple(SegmentRef(**ref) for ref in raw["segments"])
        manifest = new_manifest(
            parent=raw["parent"], time=raw["time"], message=raw["message"], segments=segments
        )
        stored = raw["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamaged(
            f"manifest {path} is damaged: {error!r}; restore it from a copy"
        ) from error
    if manifest.version != stored or manifest.version != path.stem:
        raise StoreDamaged(
            f"manifest {path} was altered: its content hashes to {manifest.version}; "
            "restore it from a copy"
        )
    return manifest


def _body(
    parent: str | None, time: str, message: str, segments: tuple[SegmentRef, ...]
) -> dict[str, Any]:
    return {
        "parent": parent,
        "time": time,
        "message": message,
        "segments": [asdict(ref) for ref in segments],
    }


def _version(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:VERSION_LENGTH]
