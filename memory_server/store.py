"""The durable memory: segments, manifests and HEAD, in plain files.

    STORE/store.json             what all entries have in common (tokenizer, entry length)
    STORE/segments/*.arrow       immutable entries, named by their checksum
    STORE/deletions/*.npy        removed rows of one segment, named by their checksum
    STORE/manifests/<version>.json
    STORE/HEAD                   the newest version, the only file that ever changes
    STORE/incoming/              where segments are written before a commit adopts them

A commit publishes everything that it needs, and HEAD last: a crash at any byte leaves the old
version or the new one. Removal is of *rows*, so one commit may remove an id and add it again with
another text.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from memory_server.changes import NAME_LENGTH, npy_bytes, reference, refuse_known_ids, without
from memory_server.errors import (
    StoreConflict,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    UnknownVersion,
)
from memory_server.files import Files
from memory_server.manifest import (
    Manifest,
    SegmentRef,
    dump_manifest,
    new_manifest,
    parse_manifest,
)
from memory_server.segments import Int64Array, Segment, SegmentMeta, sha256_of

STORE_FORMAT = "pluglm-store-1"


class Store:
    """A store opened for reading and committing. Make one with `Store.create` or `Store.open`."""

    def __init__(self, path: Path, meta: SegmentMeta, files: Files) -> None:
        self.path = path
        self.meta = meta
        self._files = files

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        tokenizer_fingerprint: str,
        entry_tokens: int,
        vocab_size: int,
        pad_token_id: int,
        files: Files | None = None,
    ) -> Self:
        """Make an empty store with one empty version.

        Raises:
            StoreError: there is a store already.
        """
        files = files or Files()
        meta = SegmentMeta(
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            entry_tokens=entry_tokens,
            pad_token_id=pad_token_id,
        )
        store = cls(Path(path), meta, files)
        if (store.path / "HEAD").exists():
            raise StoreError(f"{store.path} holds a store already; open it, or choose another path")
        for name in ("segments", "deletions", "manifests", "incoming"):
            files.make_directory(store.path / name)
        settings = {"format": STORE_FORMAT, **asdict(meta)}
        files.publish_bytes(
            store.path / "store.json", (json.dumps(settings, indent=1) + "\n").encode()
        )
        store._publish(parent=None, message="created", segments=())
        return store

    @classmethod
    def open(cls, path: Path | str, *, files: Files | None = None) -> Self:
        """Open a store and check its head: every file there, of its size, with a readable footer.

        Raises:
            StoreNotFound: no store at `path`. StoreDamaged: names the damaged file.
        """
        files = files or Files()
        path = Path(path)
        try:
            raw = json.loads(files.read_bytes(path / "store.json"))
            files.read_bytes(path / "HEAD")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFound(
                f"no memory store at {path} ({Path(str(error.filename)).name} is missing); "
                "build one with `pluglm corpus build`"
            ) from error
        except ValueError as error:
            raise StoreDamaged(f"{path / 'store.json'} is damaged: {error}") from error
        if not isinstance(raw, dict) or raw.pop("format", None) != STORE_FORMAT:
            raise StoreDamaged(f"{path / 'store.json'} does not describe a {STORE_FORMAT} store")
        try:
            meta = SegmentMeta(**raw)
        except (TypeError, ValueError) as error:
            raise StoreDamaged(f"{path / 'store.json'} is damaged: {error}") from error
        store = cls(path, meta, files)
        for ref in store.manifest().segments:
            store.segment(ref)
            store.deleted_rows(ref)
        return store

    @property
    def incoming(self) -> Path:
        """Where to write new segments: `commit` adopts them from there without copying."""
        return self.path / "incoming"

    def head(self) -> str:
        """The newest content version."""
        return self._files.read_bytes(self.path / "HEAD").decode().strip()

    def manifest(self, version: str | None = None) -> Manifest:
        """The manifest of `version`, by default the head's.

        Raises:
            UnknownVersion: there is none. StoreDamaged: it was altered.
        """
        version = self.head() if version is None else version
        path = self.path / "manifests" / f"{version}.json"
        if not version.isalnum() or not path.exists():
            raise UnknownVersion(
                f"the store {self.path} has no content version {version!r}; its head is "
                f"{self.head()}"
            )
        return parse_manifest(self._files.read_bytes(path), path)

    def segment_path(self, ref: SegmentRef) -> Path:
        return self.path / "segments" / ref.file

    def segment(self, ref: SegmentRef) -> Segment:
        """Map a segment after the checks that cost nothing: size, footer, row count, tokenizer.

        Raises:
            StoreDamaged: names the file.
        """
        path = self.segment_path(ref)
        segment = Segment(path)
        size = self._files.size(path)
        if size != ref.bytes or segment.rows != ref.rows or segment.meta != self.meta:
            raise StoreDamaged(
                f"segment {path} has {segment.rows} rows in {size} bytes, but its manifest says "
                f"{ref.rows} "
                f"in {ref.bytes}, or it is of another tokenizer; restore the file from a copy"
            )
        return segment

    def deleted_rows(self, ref: SegmentRef) -> Int64Array:
        """The removed rows of a segment, int64, ascending.

        Raises:
            StoreDamaged: names the file.
        """
        if ref.deletions is None:
            return np.empty(0, dtype=np.int64)
        path = self.path / "deletions" / ref.deletions
        try:
            data = self._files.read_bytes(path)
        except FileNotFoundError as error:
            raise StoreDamaged(f"{path} is missing; restore it from a copy") from error
        if sha256(data).hexdigest()[:NAME_LENGTH] != path.stem:
            raise StoreDamaged(f"{path} was altered: its checksum is wrong; restore it from a copy")
        rows: Int64Array = np.load(io.BytesIO(data), allow_pickle=False)
        return rows

    def verify_segment(self, ref: SegmentRef) -> None:
        """Check a segment's whole content against its checksum: as slow as reading it.

        Raises:
            StoreDamaged: names the file.
        """
        self.segment(ref)
        found = sha256_of(self.segment_path(ref))
        if found != ref.sha256:
            raise StoreDamaged(
                f"segment {self.segment_path(ref)} was altered: its sha256 is {found[:12]}…, its "
                "manifest "
                f"says {ref.sha256[:12]}…; restore the file from a copy, or use a version without "
                "it"
            )

    def verify(self, version: str | None = None) -> None:
        """Check every byte that a version, by default the head, depends on.

        Raises:
            StoreDamaged: names the first damaged file.
        """
        for ref in self.manifest(version).segments:
            self.verify_segment(ref)
            self.deleted_rows(ref)

    def commit(
        self,
        *,
        add_segments: Sequence[Path | str] = (),
        remove_ids: Iterable[int] | npt.NDArray[np.int64] = (),
        message: str,
        domain: str = "default",
        parent: str | None = None,
    ) -> str:
        """Make a new content version: the parent's, less `remove_ids`, with `add_segments` in
        `domain`.

        Args:
            add_segments: segment files. Those in `incoming` are moved into the store; others are
                copied.
            remove_ids: ids that live in the parent; an id may be removed and added in one commit.
            parent: the version that the change was made against; by default the head as the commit
                begins.

        Returns:
            The new version, which is now the head.

        Raises:
            StoreConflict: another writer committed since `parent`; nothing changed.
            TokenizerMismatch, DuplicateEntry, UnknownEntry, StoreDamaged, ValueError: refused;
            nothing changed.
        """
        base = self.manifest(parent)
        additions = [Path(path) for path in add_segments]
        removed = np.unique(np.fromiter(remove_ids, dtype=np.int64))
        if not additions and not len(removed):
            raise ValueError("nothing to commit: give add_segments, remove_ids or both")
        if not domain or not message:
            raise ValueError("a commit needs a message and a domain that are not empty")
        kept, removals = without(self, base, removed)
        added = [reference(self, path, domain) for path in additions]
        refuse_known_ids(self, kept, removals, added, additions)
        for ref in kept:
            if ref.file in removals and ref.deletions is not None:
                self._files.publish_bytes(
                    self.path / "deletions" / ref.deletions, npy_bytes(removals[ref.file])
                )
        for path, ref in zip(additions, added, strict=True):
            self._files.adopt(
                path, self.segment_path(ref), share=path.resolve().parent == self._incoming()
            )
        live = tuple(ref for ref in kept if ref.deleted < ref.rows)
        version = self._publish(
            parent=base.version,
            message=message,
            segments=(*live, *(ref for ref in added if ref.rows)),
        )
        for path in additions:
            if path.resolve().parent == self._incoming():
                self._files.remove(path)
        return version

    def _incoming(self) -> Path:
        return self.incoming.resolve()

    def _publish(
        self, *, parent: str | None, message: str, segments: tuple[SegmentRef, ...]
    ) -> str:
        """Write the manifest, then move HEAD if it still is at `parent`."""
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        manifest = new_manifest(parent=parent, time=time, message=message, segments=segments)
        path = self.path / "manifests" / f"{manifest.version}.json"
        self._files.publish_bytes(path, dump_manifest(manifest))
        with self._files.exclusive(self.path / ".lock"):
            head = self.head() if (self.path / "HEAD").exists() else None
            if head != parent:
                raise StoreConflict(
                    f"another writer moved {self.path} from version {parent} to {head}; nothing "
                    "of this "
                    "commit is visible: look at the new version and commit again"
                )
            self._files.publish_bytes(self.path / "HEAD", f"{manifest.version}\n".encode())
        return manifest.version
