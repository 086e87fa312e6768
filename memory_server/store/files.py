"""Crash-safe local files: what the store, its segments and stored vectors write through.

A file appears under its name only when it is whole and on disk: written under a temporary name,
synced, renamed or linked, and the directory synced. Each primitive is a method of its own, so that
a test can make any one fail.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from memory_server.errors import StoreFull, StoreReadOnly

TEMPORARY_PREFIX = ".tmp-"
COPY_BYTES = 1 << 22
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV})


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

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def publish(
        self,
        path: Path,
        write: Callable[[BinaryIO], None],
        *,
        bytes_needed: int | None = None,
    ) -> None:
        """Write `path` so that a crash at any byte leaves its old content or all of the new.

        Raises:
            StoreFull: the disk has no room; `path` is as it was.
        """
        with self._written_aside(path, write, bytes_needed) as temporary:
            self.rename(temporary, path)
        self.sync_directory(path.parent)

    def publish_bytes(self, path: Path, data: bytes) -> None:
        self.publish(path, lambda handle: _write_all(handle, data), bytes_needed=len(data))

    def create_bytes(self, path: Path, data: bytes) -> None:
        """Make `path` appear whole, or not at all because it is there already: one caller wins.

        Raises:
            FileExistsError: somebody made it. StoreReadOnly: no hard links on this filesystem.
        """
        with self._written_aside(path, lambda handle: _write_all(handle, data), len(data)) as aside:
            try:
                self.link(aside, path)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise StoreReadOnly(
                        f"{path} cannot be created exclusively: its filesystem has no hard links "
                        f"({error}); keep a store that is written to on a filesystem that has them"
                    ) from error
                raise
            with contextlib.suppress(OSError):  # the name counts; gc sweeps what is left beside it
                self.remove(aside)
        self.sync_directory(path.parent)

    def adopt(self, source: Path, target: Path, *, share: bool) -> None:
        """Make `source`'s content appear at `target`, whole, and stay there.

        Args:
            share: link instead of copying, for a source that nobody will ever write to again.
        """
        if share:
            with source.open("rb") as handle:
                self.sync(handle)
            self.link(source, target)
            self.sync_directory(target.parent)
        else:
            with source.open("rb") as reader:
                size = source.stat().st_size
                self.publish(target, lambda handle: _copy(reader, handle), bytes_needed=size)

    @contextlib.contextmanager
    def _written_aside(
        self, path: Path, write: Callable[[BinaryIO], None], bytes_needed: int | None
    ) -> Iterator[Path]:
        """A temporary file beside `path`, whole and on disk; gone when the block raises."""
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(6)}")
        try:
            with self.open_new(temporary) as handle:
                write(handle)
                self.sync(handle)
            yield temporary
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                size = "" if bytes_needed is None else f", which needs {bytes_needed:,} bytes"
                raise StoreFull(
                    f"no room on the disk for {path}{size} ({error.strerror}); nothing changed: "
                    "free some space and try again"
                ) from error
            raise


def _write_all(handle: BinaryIO, data: bytes) -> None:
    handle.write(data)


def _copy(reader: BinaryIO, writer: BinaryIO) -> None:
    while chunk := reader.read(COPY_BYTES):
        writer.write(chunk)
