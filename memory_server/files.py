"""All durable I/O of the store in one place, so that another filesystem can take the local one's
room.

A file appears under its name only when it is whole and on disk: written under a temporary name,
synced, renamed, and the directory synced. Each primitive is a method of its own, so that a test
can make any one fail.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
COPY_BYTES = 1 << 22


class Files:
    """Crash-safe local files."""

    def open_new(self, path: Path) -> BinaryIO:
        return path.open("xb")

    def sync(self, handle: BinaryIO) -> None:
        handle.flush()
        os.fsync(handle.fileno())

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def sync_directory(self, directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_directory(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def publish(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        """Write `path` so that a crash at any byte leaves its old content or all of the new."""
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(6)}")
        try:
            with self.open_new(temporary) as handle:
                write(handle)
                self.sync(handle)
            self.rename(temporary, path)
        except BaseException:
            self.remove(temporary)
            raise
        self.sync_directory(path.parent)

    def publish_bytes(self, path: Path, data: bytes) -> None:
        self.publish(path, lambda handle: _write_all(handle, data))

    def adopt(self, source: Path, target: Path, *, share: bool) -> None:
        """Make `source`'s content appear at `target`.

        Args:
            share: link instead of copying, for a source that nobody will ever write to again.
        """
        if target.exists():
            return  # content-addressed names: the same name is the same content
        if share:
            self.link(source, target)
            self.sync_directory(target.parent)
        else:
            with source.open("rb") as reader:
                self.publish(target, lambda handle: _copy(reader, handle))

    def read_bytes(self, path: Path) -> bytes:
        return path.read_bytes()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusive(self, path: Path) -> Iterator[None]:
        """Hold a lock that other processes on this filesystem respect; a dead holder frees it."""
        with path.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _write_all(handle: BinaryIO, data: bytes) -> None:
    handle.write(data)


def _copy(reader: BinaryIO, writer: BinaryIO) -> None:
    while chunk := reader.read(COPY_BYTES):
        writer.write(chunk)
