"""The directory of a build under way: its lock, its request and the journal of finished chunks.

Everything lies in OUT/.build until the corpus is whole. The journal has one line per finished
chunk, written after the chunk's parts are in place, so a build that is killed loses only chunks
under way.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.corpus.encode import ChunkDone, chunk_directory
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import BUILD_DIRECTORY, LOCK, MANIFEST

FINISHED_NAMES = ("sequences", "heldout", "memory", "tokenizer", "token_counts.npy")


class Workspace:
    """Paths and records of one build."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.root = out / BUILD_DIRECTORY
        self.chunks = self.root / "chunks"
        self.final = self.root / "final"
        self.tokenizer = self.root / "tokenizer"
        self._request = self.root / "request.json"
        self._journal = self.root / "journal.jsonl"

    def read_request(self) -> dict[str, Any] | None:
        """What an interrupted build here was asked for, or None when there was none."""
        try:
            request = json.loads(self._request.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{self._request} is damaged ({error}); start anew with overwrite (--overwrite)"
            ) from error
        return dict(request)

    def begin(self, request: Mapping[str, Any]) -> None:
        """Make the directories and record the request."""
        self.chunks.mkdir(parents=True, exist_ok=True)
        write_json(self._request, request)

    def finished_chunks(self) -> dict[int, ChunkDone]:
        """Chunks whose parts are in place, by index. A line that was cut short does not count."""
        try:
            lines = self._journal.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines[:-1]:
            try:
                done = ChunkDone(**json.loads(line))
            except (ValueError, TypeError):
                continue  # half a line before a kill; the chunk is encoded again
            if chunk_directory(self.chunks, done.index).is_dir():
                found[done.index] = done
        return found

    @contextmanager
    def journal(self) -> Iterator["Journal"]:
        """Open the journal to add to it; a half line at its end is closed off first."""
        with self._journal.open("ab") as handle:
            if handle.tell():
                handle.write(b"\n")
            yield Journal(handle.fileno(), handle)

    def clear(self) -> None:
        """Remove a corpus and the traces of a build, and nothing else that lies there."""
        # The manifest first: without it nothing counts as finished.
        (self.out / MANIFEST).unlink(missing_ok=True)
        for path in (*(self.out / name for name in FINISHED_NAMES), self.root):
            remove(path)

    def publish(self) -> None:
        """Move the finished parts into the corpus directory; the manifest is written after."""
        for name in FINISHED_NAMES:
            remove(self.out / name)
            (self.final / name).rename(self.out / name)

    def discard(self) -> None:
        """Remove the build directory."""
        remove(self.root)


class Journal:
    """Appends finished chunks; each is on disk when `add` returns."""

    def __init__(self, descriptor: int, handle: Any) -> None:
        self._descriptor = descriptor
        self._handle = handle

    def add(self, done: ChunkDone) -> None:
        self._handle.write(json.dumps(done.to_json()).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._descriptor)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a corpus directory against other builds; the lock goes with the process that held it.

    Raises:
        CorpusError: another build runs there, or it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / LOCK).open("ab")
    except OSError as error:
        raise CorpusError(
            f"cannot write to {out} ({error.strerror or error}); choose another output directory"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise CorpusError(
                f"another build is writing {out}; wait for it, or choose another output directory"
            ) from error
        yield


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file that holds all of its old content or all of the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(values, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
