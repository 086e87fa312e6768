"""Where a store's files are: the few operations that the store needs of any filesystem.

Names are relative to the store, with slashes (`segments/….arrow`). `create` is the one that decides
between rival writers: of any number that create the same name, on any machine, exactly one is told
that it did.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memory_server.store.files import Files
from memory_server.store.segments import sha256_of


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of the store: its name in its directory, its size, and when it was last written
    (seconds since 1970; of a filesystem that does not tell, None)."""

    name: str
    bytes: int
    modified_s: float | None


class Storage(Protocol):
    """A directory of files that appear whole. Every failure is an OSError or a StoreError."""

    @property
    def location(self) -> str:
        """The path or URL, for messages and for opening the store elsewhere."""

    @property
    def local_root(self) -> Path | None:
        """The directory, of a store on this machine's filesystem."""

    @property
    def incoming(self) -> Path:
        """A local directory where new segments are written before a commit adopts them."""

    @property
    def files(self) -> Files:
        """What `incoming` is written through."""

    def check_writable(self) -> None:
        """Raise StoreReadOnly when `create` cannot be trusted here."""

    def prepare(self, directories: tuple[str, ...]) -> None:
        """Make the directories that are not there."""

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError."""

    def list(self, directory: str) -> list[FileInfo]:
        """The files of a directory, in any order; none when it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Make the file, or replace it. A crash leaves the old content or the new."""

    def create(self, name: str, data: bytes) -> None:
        """Make the file unless it is there. Raises FileExistsError."""

    def confirm(self, name: str) -> None:
        """Make sure that a file which is visible will survive a loss of power."""

    def adopt(self, source: Path, name: str, *, share: bool) -> None:
        """Bring a local file's content in. `share`: nobody will write to the source again."""

    def local_path(self, name: str, *, sha256: str, bytes_: int) -> Path:
        """A local file with this content, for mapping. Raises StoreDamaged, FileNotFoundError."""

    def sha256(self, name: str) -> str:
        """Of the file as it is stored, read whole."""

    def remove(self, name: str) -> None:
        """Remove the file if it is there."""

    def remove_incoming(self, path: Path) -> None:
        """Remove a file of `incoming` if it is there."""


class LocalStorage:
    """A directory of this machine, or of a network filesystem with hard links."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self._files = files

    @property
    def files(self) -> Files:
        return self._files

    @property
    def location(self) -> str:
        return str(self.root)

    @property
    def local_root(self) -> Path | None:
        return self.root

    @property
    def incoming(self) -> Path:
        return self.root / "incoming"

    def check_writable(self) -> None:
        """A filesystem without hard links is noticed by the first `create`, which changes nothing
        else."""

    def prepare(self, directories: tuple[str, ...]) -> None:
        for directory in (*directories, "incoming"):
            if not (self.root / directory).is_dir():
                self._files.make_directory(self.root / directory)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, "no such directory", str(self.root)) from error

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def list(self, directory: str) -> list[FileInfo]:
        found = []
        try:
            entries = os.scandir(self.root / directory)
        except FileNotFoundError:
            return []
        with entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another writer's temporary file
                    continue
                found.append(
                    FileInfo(name=entry.name, bytes=stat.st_size, modified_s=stat.st_mtime)
                )
        return found

    def write(self, name: str, data: bytes) -> None:
        self._files.publish_bytes(self.root / name, data)

    def create(self, name: str, data: bytes) -> None:
        self._files.create_bytes(self.root / name, data)

    def confirm(self, name: str) -> None:
        self._files.sync_directory((self.root / name).parent)

    def adopt(self, source: Path, name: str, *, share: bool) -> None:
        self._files.adopt(source, self.root / name, share=share)

    def local_path(self, name: str, *, sha256: str, bytes_: int) -> Path:
        return self.root / name

    def sha256(self, name: str) -> str:
        return sha256_of(self.root / name)

    def remove(self, name: str) -> None:
        self._files.remove(self.root / name)

    def remove_incoming(self, path: Path) -> None:
        self._files.remove(path)


def made_incoming(storage: Storage) -> Path:
    """Where to write new segments; a copy of a store may have left the empty directory out."""
    storage.incoming.mkdir(parents=True, exist_ok=True)
    return storage.incoming
