"""What a memory's coordinator keeps on disk, so that nothing is lost when every process is.

STATE/book.json              the epochs, which one is live, who holds what: the truth
STATE/previous.json          the book before this start, until an epoch of this start is live
STATE/secret                 proves who belongs to this memory
STATE/weights/<id>.safetensors   as long as an epoch of either book needs them
STATE/lock                   held by the one coordinator that may write here

All of it is for its owner's eyes: weights may hold what they were trained on.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from memory_server.actors.server_book import ServerBook, book_as_json, book_from_json
from memory_server.errors import MemoryServerError, StateDamaged, StateNotFound, StateUnusable
from memory_server.store.files import TEMPORARY_PREFIX, Files

SECRET_BYTES = 32
LOCK_PAUSE_S = 0.05
DYING_S = 5.0  # Ray forgets an actor's name before its process has ended
_WEIGHTS_NAME = re.compile(r"(\d+)\.safetensors")


class PrivateFiles(Files):
    """Crash-safe files that only their owner may read, whatever the umask is."""

    def open_new(self, path: Path) -> BinaryIO:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        return os.fdopen(descriptor, "wb")


class StateDirectory:
    """A state directory; the files in it appear whole or not at all.

    What cannot be read or written for the disk's reasons raises StateUnusable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._files = PrivateFiles()
        self._weights = self.path / "weights"
        self._book = self.path / "book.json"
        self._previous = self.path / "previous.json"

    def exists(self) -> bool:
        return self._book.exists()

    def create(self, book: ServerBook) -> bytes:
        """Begin anew, with this book and a new secret, which is returned. What was live before
        is kept beside it until an epoch is live, so that `abandon` can bring it back.

        Args:
            book: it must number on from the one before (`before`), so that no file is reused.

        Raises:
            StateUnusable: the directory cannot be written. StateDamaged.
        """
        with self._usable():
            for directory in (self.path, self._weights):
                _make_private(directory)
            if self.exists() and self.load(now=0.0).epochs.live is not None:
                self._files.publish_bytes(self._previous, self._book.read_bytes())
            secret = secrets.token_bytes(SECRET_BYTES)
            self._files.publish_bytes(self.path / "secret", secret.hex().encode())
            self.save(book)
            self.sweep()
            self._remove_weights_except(self._previous_weights())
        return secret

    def before(self) -> ServerBook:
        """What a new start goes on from: the newest book of which an epoch was live, numbering on
        from every start. Raises StateNotFound, StateDamaged."""
        newest = self.load(now=0.0)
        if newest.epochs.live is not None or not self._previous.exists():
            return newest
        book = self._loaded(self._previous, 0.0)
        book.epochs.last_epoch = max(book.epochs.last_epoch, newest.epochs.last_epoch)
        book.epochs.last_weights = max(book.epochs.last_weights, newest.epochs.last_weights)
        return book

    def abandon(self, *, keep_live: bool) -> None:
        """End a memory's state: if none of its epochs was ever live, what was there before it
        comes back; otherwise it is removed.

        Args:
            keep_live: a state with a live epoch stays.

        Raises:
            MemoryServerError: a coordinator still writes there.
        """
        if not self.path.exists():
            return
        with self.locked(), self._usable():
            try:
                live = self.load(now=0.0).epochs.live
            except StateNotFound:
                live = None
            if live is None and self._previous.exists():
                self._files.rename(self._previous, self._book)
                self._files.sync_directory(self.path)
                self._remove_weights_except(self.load(now=0.0).weights_needed())
                return
            if live is not None and keep_live:
                return
        self.remove()

    def secret(self) -> bytes:
        """Raises StateNotFound, StateDamaged."""
        try:
            with self._usable(may_be_missing=True):
                return bytes.fromhex((self.path / "secret").read_text(encoding="ascii"))
        except FileNotFoundError as error:
            raise StateNotFound(_no_state(self.path)) from error
        except ValueError as error:
            raise StateDamaged(f"{self.path / 'secret'} is damaged: {error}") from error

    def save(self, book: ServerBook) -> None:
        """Returns when the book is on disk. Raises StateUnusable, StoreFull."""
        data = json.dumps(book_as_json(book), indent=1) + "\n"
        with self._usable():
            self._files.publish_bytes(self._book, data.encode())

    def load(self, *, now: float) -> ServerBook:
        """The book; pins' leases begin at `now`. Raises StateNotFound, StateDamaged."""
        return self._loaded(self._book, now)

    def weights_file(self, weights_id: int) -> Path:
        return self._weights / f"{weights_id}.safetensors"

    def save_weights(self, weights_id: int, weights: Mapping[str, Tensor]) -> None:
        """Returns when they are on disk. Raises StateUnusable, StoreFull."""
        data = safetensors.torch.save(dict(weights))

        def write(handle: BinaryIO) -> None:
            handle.write(data)

        with self._usable():
            self._files.publish(self.weights_file(weights_id), write)

    def load_weights(self, weights_id: int) -> dict[str, Tensor]:
        """Raises StateNotFound, StateDamaged."""
        file = self.weights_file(weights_id)
        try:
            with self._usable(may_be_missing=True):
                return safetensors.torch.load_file(file)
        except FileNotFoundError as error:
            raise StateNotFound(f"{file} is missing; stage the weights again") from error
        except SafetensorError as error:
            raise StateDamaged(f"{file} is damaged: {error}; stage the weights again") from error

    def tidy(self, book: ServerBook) -> None:
        """After `book` was saved: remove what neither it nor the book before this start needs.

        Weights above the last booked ones are being written and stay, as temporary files do.
        """
        with self._usable():
            if book.epochs.live is not None:
                self._previous.unlink(missing_ok=True)
            needed = book.weights_needed() | self._previous_weights()
            self._remove_weights_except(needed, up_to=book.epochs.last_weights)

    def sweep(self) -> None:
        """Remove what a dead coordinator left half written. Only for who holds the directory."""
        with self._usable():
            for directory in (self.path, self._weights):
                for file in directory.glob(f"{TEMPORARY_PREFIX}*"):
                    file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory, and what is above it if that is empty and was made for servers.

        Raises:
            MemoryServerError: a coordinator still writes there.
        """
        if not self.path.exists():
            return
        with self.locked(), self._usable(), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)
        if self.path.parent.name == "servers":
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; a dead holder's lock is free, and one that is dying is waited for.

        Raises:
            MemoryServerError: a memory runs on it already.
        """
        with contextlib.ExitStack() as held:
            with self._usable():
                _make_private(self.path)
                lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
                held.callback(os.close, lock)
            deadline = time.monotonic() + DYING_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() < deadline:
                        time.sleep(LOCK_PAUSE_S)
                        continue
                    raise MemoryServerError(
                        f"another memory that runs already keeps its state in {self.path}; attach "
                        "to it, shut it down, or choose another name or state_dir"
                    ) from error
            yield

    def _loaded(self, file: Path, now: float) -> ServerBook:
        try:
            with self._usable(may_be_missing=True):
                raw: Mapping[str, Any] = json.loads(file.read_bytes())
            return book_from_json(raw, now)
        except FileNotFoundError as error:
            raise StateNotFound(_no_state(self.path)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateDamaged(
                f"{file} is damaged: {error!r}; remove {self.path} and start "
                "the memory with weights"
            ) from error

    def _previous_weights(self) -> set[int]:
        if not self._previous.exists():
            return set()
        return self._loaded(self._previous, 0.0).weights_needed()

    def _remove_weights_except(self, needed: Collection[int], *, up_to: int | None = None) -> None:
        for file in self._weights.iterdir():
            match = _WEIGHTS_NAME.fullmatch(file.name)
            if match is None or int(match[1]) in needed:
                continue
            if up_to is None or int(match[1]) <= up_to:
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _usable(self, *, may_be_missing: bool = False) -> Iterator[None]:
        """Args: may_be_missing: FileNotFoundError is for the caller to explain."""
        try:
            yield
        except OSError as error:
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            raise StateUnusable(
                f"the state in {self.path} cannot be read or written: {error}; mend the disk or "
                "the directory's rights: what was booked before stays in force"
            ) from error


def versions_of_servers(servers: Path) -> set[str]:
    """The content versions that memories whose states are in this directory answer from or stage,
    or will answer from when they go on.

    Raises:
        StateDamaged; StateUnusable: one cannot be looked into, such as another user's.
    """
    versions = set()
    for directory in _states(servers):
        for file in (directory / "book.json", directory / "previous.json"):
            with contextlib.suppress(StateNotFound):  # its memory ends meanwhile
                versions |= StateDirectory(directory)._loaded(file, 0.0).versions_needed()
    return versions


def _states(servers: Path) -> list[Path]:
    """A glob would pass over what may not be looked into, as if no memory were there."""
    looked_at = servers
    try:
        found = [Path(entry.path) for entry in os.scandir(servers) if entry.is_dir()]
        for looked_at in found:
            next(looked_at.iterdir(), None)
    except FileNotFoundError:  # no memory has kept its state here, or one ends meanwhile
        return [] if looked_at == servers else _states(servers)
    except OSError as error:
        raise StateUnusable(
            f"{looked_at} cannot be read ({error.strerror}): it keeps the state of a memory "
            "server, and which versions it needs is not known; run this as the user who runs that "
            "server"
        ) from error
    return found


def _make_private(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if directory.stat().st_mode & 0o777 != 0o700:
        directory.chmod(0o700)


def _no_state(path: Path) -> str:
    return f"{path} holds no memory's state; start the memory with weights"
