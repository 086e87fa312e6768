"""Parts of sequences that are not mapped where they lie: fetched or decoded once per node.

A part on another filesystem, or one in Parquet, becomes an Arrow file of one record batch in a
cache directory when the first sequence of it is wanted. All processes of a node share the cache;
when it is full, what was asked for least recently goes. Whoever has mapped such a file can read it
on, and unmaps it when it asks for another part, which gives the disk space back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from memory_server.store.segment_cache import default_cache

DEFAULT_CACHE_GIB = 64.0
_PARTS = "parts"


class CacheError(ValueError):
    """A part or file could not be fetched; the message names it and says why."""


@dataclass(frozen=True)
class PartCache:
    """Where fetched parts lie, and how much of them is kept.

    Args:
        folder: the cache directory; made when needed.
        most_bytes: what parts may take; one part is always kept.
    """

    folder: Path
    most_bytes: int

    @classmethod
    def of_this_machine(cls, gib: float = DEFAULT_CACHE_GIB) -> PartCache:
        """In the directory that PLUGLM_CACHE_DIR names, or the user's cache directory."""
        return cls(default_cache().resolve(), int(gib * 2**30))

    @contextlib.contextmanager
    def held(self, url: str) -> Iterator[Path]:
        """The part as an Arrow file on this machine; blocks while it is fetched or decoded.

        No process takes the file out of the cache before the block ends, and a file that was mapped
        in it can be read on after that.

        Args:
            url: a path or fsspec URL that ends in .arrow or .parquet.

        Raises:
            CacheError: it cannot be read, or is damaged.
        """
        folder = self.folder / _PARTS
        with contextlib.ExitStack() as held:
            try:
                target = folder / f"{_key(url)}.arrow"
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{target}.lock"))
                if not target.exists():
                    self._make(url, target)
                os.utime(target)
                self._evict(keep=target)
            except (OSError, pa.ArrowException, ImportError, ValueError) as error:
                raise CacheError(
                    f"{url} cannot be brought to {folder} ({type(error).__name__}: {error}); see "
                    "that the file is there and readable from this node, and the cache directory "
                    "(PLUGLM_CACHE_DIR) writable and with room"
                ) from error
            yield target

    def _make(self, url: str, target: Path) -> None:
        # Whole or absent: a process that dies leaves a hidden file, never half a part.
        part = target.parent / f".{uuid.uuid4().hex}"
        try:
            if url.endswith(".parquet"):
                _decode(url, part)
            else:
                with fsspec.open(url, "rb") as source, part.open("wb") as out:
                    while block := source.read(1 << 22):
                        out.write(block)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        found = []
        for path in (self.folder / _PARTS).glob("*.arrow"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.most_bytes:
                return
            # What another process brings or maps at this moment is not taken from under it.
            if path != keep and _unlinked(path):
                total -= size


def _unlinked(path: Path) -> bool:
    """Remove a part unless someone holds it; whether it is gone."""
    lock = FileLock(f"{path}.lock", blocking=False)
    try:
        with lock:
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _key(url: str) -> str:
    """Names the content as well as it can be told without reading it: a changed file is another."""
    filesystem, path = fsspec.core.url_to_fs(url)
    text = f"{url}\0{filesystem.ukey(path)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _decode(url: str, target: Path) -> None:
    """Parquet to one record batch of fixed-size lists, as sequences are mapped."""
    with fsspec.open(url, "rb") as source:
        table = pq.read_table(source)
    batch = table.combine_chunks().to_batches()
    columns: dict[str, Any] = {
        name: (batch[0].column(name) if batch else table.column(name).combine_chunks())
        for name in table.column_names
    }
    columns["input_ids"] = _fixed(columns.get("input_ids"))
    whole = pa.record_batch(columns)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_batch(whole)


def _fixed(tokens: Any) -> Any:
    """Parquet has no fixed-size lists of its own: lists of one length become such."""
    if tokens is None or pa.types.is_fixed_size_list(tokens.type):
        return tokens
    if not (pa.types.is_list(tokens.type) or pa.types.is_large_list(tokens.type)):
        raise ValueError(f"input_ids is {tokens.type}; needed is a list of integers")
    lengths = set(tokens.value_lengths().unique().to_pylist())
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"input_ids has rows of {sorted(map(str, lengths))} tokens; pad them")
    return pa.FixedSizeListArray.from_arrays(tokens.flatten(), lengths.pop())
