"""Local copies of a remote store's segments, for mapping: named by content, checked when fetched.

Processes of one machine share the copies, and so does every store that holds the same segment. The
directory is `PLUGLM_CACHE_DIR`, or `pluglm` in the user's cache directory. Nothing bounds it: a
copy stays until somebody deletes it, which is safe at any time when no process maps it.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from memory_server.errors import StoreDamaged
from memory_server.store.files import TEMPORARY_PREFIX, Files

CACHE_VARIABLE = "PLUGLM_CACHE_DIR"
FETCH_BYTES = 1 << 25


def default_cache() -> Path:
    """The directory that the environment asks for."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "pluglm"


def fetched(
    cache: Path,
    *,
    sha256: str,
    bytes_: int,
    where: str,
    chunks: Callable[[], Iterator[bytes]],
    files: Files,
) -> Path:
    """The local copy of a segment; `chunks` are read only when it is not there yet.

    Args:
        sha256, bytes_: what the content must be.
        where: the remote file, for messages.

    Raises:
        StoreDamaged: the remote file is another. StoreFull: no room for the copy.
    """
    path = cache / "segments" / f"{sha256}.arrow"
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == bytes_:
            return path
    files.make_directory(path.parent)
    # Renamed only after the check, so that a wrong copy is never seen under its name.
    aside = path.with_name(f"{TEMPORARY_PREFIX}{sha256[:16]}-{secrets.token_hex(6)}.arrow")
    digest, size = hashlib.sha256(), 0

    def write(handle: BinaryIO) -> None:
        nonlocal size
        for chunk in chunks():
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)

    try:
        files.publish(aside, write, bytes_needed=bytes_)
        if size != bytes_ or digest.hexdigest() != sha256:
            raise StoreDamaged(
                f"{where} was altered: it has {size:,} bytes with sha256 "
                f"{digest.hexdigest()[:12]}…, its manifest says {bytes_:,} with {sha256[:12]}…; "
                "restore it from a copy, or use a version without it"
            )
        files.rename(aside, path)
    finally:
        files.remove(aside)
    return path
