"""A store on a filesystem that fsspec reaches: object stores, memory, and what pyarrow wraps.

An object store shows a put when it is whole, so nothing is written aside. What it must be able to
do beyond that is to put a file only if it is not there (S3 If-None-Match, GCS generation 0): that
decides between rival writers. Segments are mapped from local copies (`segment_cache`).
"""

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.memory import MemoryFile

from memory_server.errors import StoreReadOnly
from memory_server.store.files import Files
from memory_server.store.segment_cache import FETCH_BYTES, fetched
from memory_server.store.storage import FileInfo

# fsspec's own default of mode="create" looks first and writes then, so that two writers may both
# believe that they won. These put conditionally.
CONDITIONAL_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})

ExclusiveCreate = Callable[[Any, str, bytes], None]


class RemoteStorage:
    """A directory of a filesystem.

    Args:
        filesystem: an fsspec filesystem.
        root: the directory's path in it.
        location: the URL, for messages and for opening the store elsewhere.
        cache: local directory for copies of segments and for new ones.
        exclusive_create: puts bytes at a path of the filesystem, or raises FileExistsError, of
            any number of callers for all but one; for a filesystem of which this program does not
            know how. None: what is known.
    """

    def __init__(
        self,
        filesystem: Any,
        root: str,
        *,
        location: str,
        cache: Path,
        files: Files,
        exclusive_create: ExclusiveCreate | None = None,
    ) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self._location = location
        self._cache = cache
        self._files = files
        self._exclusive_create = exclusive_create or _known_create(filesystem)
        self._is_checked = self._exclusive_create is _create_in_memory

    @property
    def location(self) -> str:
        return self._location

    @property
    def local_root(self) -> Path | None:
        return None

    @property
    def files(self) -> Files:
        return self._files

    @property
    def incoming(self) -> Path:
        own = hashlib.sha256(self._location.encode()).hexdigest()[:16]
        return self._cache / "incoming" / own

    def check_writable(self) -> None:
        """Raise StoreReadOnly unless a second `create` of one name is refused."""
        create = self._exclusive_create
        if create is None:
            raise StoreReadOnly(
                f"{self._location} can only be read: this program knows no way to create a file "
                f"exclusively through {type(self.filesystem).__name__}, and without it two writers "
                "could lose each other's commits; take a local path, fsspec's s3, gs or abfs, or "
                "give exclusive_create"
            )
        if self._is_checked:
            return
        probe = self._path(f"next/.probe-{secrets.token_hex(6)}")
        self.filesystem.makedirs(self._path("next"), exist_ok=True)
        try:
            create(self.filesystem, probe, b"1")
            try:
                create(self.filesystem, probe, b"2")
            except FileExistsError:
                self._is_checked = True
                return
        except TypeError as error:
            raise StoreReadOnly(
                f"{self._location} can only be read: {type(self.filesystem).__name__} does not "
                f"take mode='create' ({error}); install a newer version of it"
            ) from error
        finally:
            with contextlib.suppress(Exception):
                self.filesystem.rm_file(probe)
        raise StoreReadOnly(
            f"{self._location} can only be read: {type(self.filesystem).__name__} created a file "
            "that was there already; install a newer version of it, or another server"
        )

    def prepare(self, directories: tuple[str, ...]) -> None:
        for directory in directories:
            self.filesystem.makedirs(self._path(directory), exist_ok=True)
        self._files.make_directory(self.incoming)

    def read(self, name: str) -> bytes:
        return bytes(self.filesystem.cat_file(self._path(name)))

    def size(self, name: str) -> int:
        return int(self.filesystem.info(self._path(name))["size"])

    def list(self, directory: str) -> list[FileInfo]:
        try:
            self.filesystem.invalidate_cache(self._path(directory))
            rows = self.filesystem.ls(self._path(directory), detail=True)
        except FileNotFoundError:
            return []
        return [
            FileInfo(
                name=str(row["name"]).rsplit("/", 1)[-1],
                bytes=int(row["size"] or 0),
                modified_s=_modified(row),
            )
            for row in rows
            if row["type"] == "file"
        ]

    def write(self, name: str, data: bytes) -> None:
        self.filesystem.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> None:
        self.check_writable()
        assert self._exclusive_create is not None
        self._exclusive_create(self.filesystem, self._path(name), data)

    def confirm(self, name: str) -> None:
        """What an object store shows is durable."""

    def adopt(self, source: Path, name: str, *, share: bool) -> None:
        self.filesystem.put_file(str(source), self._path(name))

    def local_path(self, name: str, *, sha256: str, bytes_: int) -> Path:
        return fetched(
            self._cache,
            sha256=sha256,
            bytes_=bytes_,
            where=f"{self._location}/{name}",
            chunks=lambda: self._chunks(name),
            files=self._files,
        )

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(name))

    def remove_incoming(self, path: Path) -> None:
        self._files.remove(path)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _chunks(self, name: str) -> Iterator[bytes]:
        """The file in pieces, without a handle that threads would share."""
        path, size = self._path(name), self.size(name)
        # Left to itself, fsspec's wrapper of pyarrow seeks in a stream that cannot.
        options = {"seekable": True} if isinstance(self.filesystem, ArrowFSWrapper) else {}
        for start in range(0, size, FETCH_BYTES):
            stop = min(size, start + FETCH_BYTES)
            yield self.filesystem.cat_file(path, start=start, end=stop, **options)


def _known_create(filesystem: Any) -> ExclusiveCreate | None:
    protocol = filesystem.protocol
    names = {protocol} if isinstance(protocol, str) else set(protocol)
    if "memory" in names:
        return _create_in_memory
    return _create_by_condition if names & CONDITIONAL_PUTS else None


def _create_in_memory(filesystem: Any, path: str, data: bytes) -> None:
    """`setdefault` is one step for all threads; the filesystem's own "create" is two."""
    path = filesystem._strip_protocol(path)
    file = MemoryFile(filesystem, path, data)
    if filesystem.store.setdefault(path, file) is not file:
        raise FileExistsError(path)


def _create_by_condition(filesystem: Any, path: str, data: bytes) -> None:
    filesystem.pipe_file(path, data, mode="create")


def _modified(row: dict[str, Any]) -> float | None:
    """Seconds since 1970, from whichever name this filesystem gives it."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = row.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
