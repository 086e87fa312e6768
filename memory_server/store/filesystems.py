"""A path, a URL, or a filesystem with a path: which storage that is."""

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as arrow_fs

from memory_server.store.files import Files
from memory_server.store.remote_storage import ExclusiveCreate, RemoteStorage
from memory_server.store.segment_cache import default_cache
from memory_server.store.storage import LocalStorage, Storage


def open_storage(
    location: Path | str | Storage,
    *,
    filesystem: Any | None = None,
    cache: Path | str | None = None,
    files: Files | None = None,
    exclusive_create: ExclusiveCreate | None = None,
) -> Storage:
    """The storage of a store.

    Args:
        location: a local path; a URL that fsspec knows ("s3://bucket/store", "memory://store",
            "file:///store"); with `filesystem`, a path in it; or a storage, which is returned.
        filesystem: an fsspec or a pyarrow filesystem. Local ones are unwrapped, so that segments
            are mapped from where they are.
        cache: local directory for copies of remote segments; by default PLUGLM_CACHE_DIR, or the
            user's cache directory.
        exclusive_create: see `RemoteStorage`.

    Raises:
        ValueError: no filesystem for this URL, or one whose package is not installed.
    """
    files = files or Files()
    if not isinstance(location, Path | str):
        return location
    if filesystem is None:
        text = str(location)
        if isinstance(location, Path) or ("://" not in text and "::" not in text):
            return LocalStorage(Path(location), files)
        try:
            filesystem, root = fsspec.core.url_to_fs(text)
        except (ValueError, ImportError) as error:
            raise ValueError(f"no filesystem for {text}: {error}") from error
        shown = text.rstrip("/")
    else:
        filesystem, root = unwrapped(filesystem, str(location))
        shown = f"{_kind(filesystem)}://{root.lstrip('/')}".rstrip("/")
    if isinstance(filesystem, LocalFileSystem):
        return LocalStorage(Path(filesystem._strip_protocol(root)), files)
    return RemoteStorage(
        filesystem,
        root,
        location=shown,
        cache=default_cache() if cache is None else Path(cache),
        files=files,
        exclusive_create=exclusive_create,
    )


def unwrapped(filesystem: Any, path: str) -> tuple[Any, str]:
    """An fsspec filesystem and the path in it, through the wrappers of both libraries.

    Raises:
        ValueError: it is neither fsspec's nor pyarrow's, or the path leads out of it.
    """
    if ".." in path.split("/"):
        raise ValueError(f"the path {path!r} leads out of its directory by '..'; give it without")
    if isinstance(filesystem, DirFileSystem):
        return unwrapped(filesystem.fs, f"{filesystem.path}/{path.lstrip('/')}")
    if isinstance(filesystem, ArrowFSWrapper):
        return unwrapped(filesystem.fs, path)
    if isinstance(filesystem, fsspec.AbstractFileSystem):
        return filesystem, path
    if isinstance(filesystem, arrow_fs.SubTreeFileSystem):
        base = filesystem.base_path.rstrip("/")
        return unwrapped(filesystem.base_fs, f"{base}/{path.lstrip('/')}")
    if isinstance(filesystem, arrow_fs.PyFileSystem) and isinstance(
        filesystem.handler, arrow_fs.FSSpecHandler
    ):
        return unwrapped(filesystem.handler.fs, path)
    if isinstance(filesystem, arrow_fs.LocalFileSystem):
        return LocalFileSystem(), path
    if isinstance(filesystem, arrow_fs.FileSystem):
        return ArrowFSWrapper(filesystem), path
    raise ValueError(
        f"{type(filesystem).__name__} is neither an fsspec nor a pyarrow filesystem; give one of "
        "these, or a URL"
    )


def _kind(filesystem: Any) -> str:
    protocol = filesystem.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])
