"""Tables of weights in files of one node: built by one process, mapped by all.

A table file lies in a directory that only this user can enter, under a digest of what the tables
are made of, so that whoever finds it has the right one. Beside it lies a lock file. Its builder
holds the lock alone; a process that uses the tables holds it with the others. The system takes the
lock from a process that dies, so a dead builder is known at once, and the last user removes the
files: nobody has to guess from a process id whether its owner still lives.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import xxhash
from safetensors.torch import save
from torch import Tensor

log = logging.getLogger(__name__)

WAIT_S = 600.0  # for a builder that lives; building takes seconds, on a busy node minutes
POLL_S = 0.05
_CHECKSUM = "xxh3"


class Unusable(Exception):
    """The directory or the file system cannot be used; says why. Build privately."""


@dataclass
class SharedTables:
    """Tables that a file maps, and this process's part in them; `close` once they are not used."""

    tensors: Mapping[str, Tensor]
    path: Path
    _lock: int | None

    def close(self) -> None:
        """Give the tables up; the last user on the node removes the file. Never raises.

        What still refers to the tensors may go on: the mapping lives as long as they do.
        """
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        _remove_if_unused(self.path, lock)
        os.close(lock)


def shared_tables(
    scratch: Path, digest: str, build: Callable[[], Mapping[str, Tensor]]
) -> SharedTables:
    """Find the tables of this digest on the node, or build them for all. Blocks.

    Args:
        scratch: a directory of this node, best in memory (/dev/shm); made if its parent exists.
        digest: names the tables; hexadecimal.
        build: called in one process of the node at a time; the others wait for it.

    Raises:
        Unusable: no directory, not ours, no room, or a builder that lives but does not finish.
        Whatever `build` raises.
    """
    try:
        directory = private_directory(scratch)
        path = directory / f"{digest}.safetensors"
        _remove_leftovers(directory, keep=path)
        return _found_or_built(path, build)
    except (OSError, TimeoutError) as error:
        raise Unusable(str(error)) from error


def private_directory(scratch: Path) -> Path:
    """The user's own directory of tables in `scratch`; made if it is not there.

    Raises:
        OSError: it cannot be made, or it is a link, another's, or open to others.
    """
    directory = scratch / f"key-tables-{os.getuid()}"
    for wanted in (scratch, directory):
        with suppress(FileExistsError):
            wanted.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(
            f"{directory} must be a directory of user {os.getuid()} that no other can enter "
            f"(mode 0700); it has mode {stat.filemode(status.st_mode)}, owner {status.st_uid}"
        )
    return directory


def _found_or_built(path: Path, build: Callable[[], Mapping[str, Tensor]]) -> SharedTables:
    deadline = time.monotonic() + WAIT_S
    while True:
        lock = _open_lock(path)
        try:
            # A builder excludes users, so whoever gets in here meets a whole file or none.
            shared = _take(lock, fcntl.LOCK_SH)
            tensors = _load(path) if shared and _is_current(lock, path) else None
            if tensors is None and _take(lock, fcntl.LOCK_EX) and _is_current(lock, path):
                # Another may have built them between the two locks.
                tensors = _load(path) or _built(path, build)
                fcntl.flock(lock, fcntl.LOCK_SH)
            if tensors is not None:
                return SharedTables(tensors, path, lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:.0f} s for another process to build {path.name}")
        time.sleep(POLL_S)


def _built(path: Path, build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Write the tables under another name, then rename; the caller holds the lock alone."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in build().items()}
    part = _part(path)
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:
            file.write(save(tensors, {_CHECKSUM: _checksum(tensors)}))
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    mapped = _load(path)
    if mapped is None:
        raise OSError(f"{path} cannot be read back as it was written")
    return mapped


def _load(path: Path) -> Mapping[str, Tensor] | None:
    """The tensors of a whole file, mapped, not copied; None if there is none or it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except FileNotFoundError:
        return None
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("tables in %s are built anew, as the file is damaged: %s", path, error)
        return None
    if _checksum(tensors) != expected:
        log.warning("tables in %s are built anew, as their checksum is wrong", path)
        return None
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = xxhash.xxh3_64()
    for name in sorted(tensors):
        checksum.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        checksum.update(tensors[name].numpy().data)
    return checksum.hexdigest()


def _open_lock(path: Path) -> int:
    return os.open(_lock(path), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _take(lock: int, kind: int) -> bool:
    """Lock now, or not at all; a lock held in another way is given up first."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(lock: int, path: Path) -> bool:
    """Whether others find the same lock file: its last user may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(lock), _lock(path).lstat())
    except FileNotFoundError:
        return False


def _remove_if_unused(path: Path, lock: int) -> None:
    try:
        if _take(lock, fcntl.LOCK_EX) and _is_current(lock, path):
            for file in (path, _part(path), _lock(path)):  # the lock last: it guards the others
                file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("tables in %s could not be removed: %s", path, error)


def _remove_leftovers(directory: Path, *, keep: Path) -> None:
    """Remove files whose users all died without closing them."""
    for file in directory.glob("*.lock"):
        path = file.with_suffix(".safetensors")
        if path == keep:
            continue
        with suppress(FileNotFoundError):
            lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            _remove_if_unused(path, lock)
            os.close(lock)


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")


def _part(path: Path) -> Path:
    return path.with_suffix(".part")
