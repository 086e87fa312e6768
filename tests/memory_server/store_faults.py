"""Local files that fail, fill up, or whose process dies at the nth step; and the operations of a
store that they are tried on."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from memory_server.store.changes import Addition
from memory_server.store.files import Files
from memory_server.store.store import Store
from tests.toy_memory import ToyEntry, toy_entries, write_toy_segment

Content = dict[int, tuple[str, str, tuple[int, ...]]]


class Gone(BaseException):
    """The process is no more: nothing that it would have done after this happens."""


class FaultyFiles(Files):
    """Counts every primitive; the one numbered `at` does not go well.

    Args:
        how: "fails" (that step raises OSError, the next ones work), "unsure" (so it does, but was
            done), "full" (a write or a new file
            finds no room), "dies" (the process ends before the step, a write half done), "done"
            (it ends just after the step).
    """

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how
        self.steps = 0
        self.is_gone = False
        self.was_hit = False

    def step(self, act: Callable[[], Any], half: Callable[[], Any] | None, *, room: bool) -> Any:
        if self.is_gone:
            raise Gone
        self.steps += 1
        if self.steps - 1 != self.at or (self.how == "full" and not room):
            return act()
        self.was_hit = True
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.how == "unsure":
            act()
        if self.how in ("fails", "unsure"):
            raise OSError(errno.EIO, "Input/output error")
        self.is_gone = True
        if self.how == "done":
            act()
        elif half is not None:
            half()
        raise Gone

    def open_new(self, path: Path) -> BinaryIO:
        opened: BinaryIO = self.step(lambda: Files.open_new(self, path), None, room=True)
        return FaultyHandle(self, opened)  # type: ignore[return-value]

    def sync(self, handle: Any) -> None:
        def half() -> None:
            size = handle.seek(0, 2)
            if isinstance(handle, FaultyHandle):  # one being written; adopted ones are old
                handle.truncate(size // 2)

        self.step(lambda: Files.sync(self, handle), half, room=False)

    def rename(self, source: Path, target: Path) -> None:
        self.step(lambda: Files.rename(self, source, target), None, room=False)

    def link(self, source: Path, target: Path) -> None:
        self.step(lambda: Files.link(self, source, target), None, room=False)

    def sync_directory(self, directory: Path) -> None:
        self.step(lambda: Files.sync_directory(self, directory), None, room=False)

    def make_directory(self, directory: Path) -> None:
        self.step(lambda: Files.make_directory(self, directory), None, room=True)

    def remove(self, path: Path) -> None:
        self.step(lambda: Files.remove(self, path), None, room=False)


class FaultyHandle:
    """A new file whose writes are steps too."""

    def __init__(self, files: FaultyFiles, handle: BinaryIO) -> None:
        self._files, self._handle = files, handle

    def write(self, data: Any) -> int:
        view = memoryview(data)
        written: int = self._files.step(
            lambda: self._handle.write(view),
            lambda: self._handle.write(view[: view.nbytes // 2]),
            room=True,
        )
        return written

    def __enter__(self) -> "FaultyHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def content(store: Store, version: str | None = None) -> Content:
    """Every live entry by its id: domain, text, tokens."""
    found: Content = {}
    for ref in store.manifest(version).segments:
        segment = store.segment(ref)
        for row in np.setdiff1d(np.arange(segment.rows), store.deleted_rows(ref)):
            entry_id = int(segment.ids[row])
            assert entry_id not in found
            tokens = tuple(int(token) for token in segment.tokens[row])
            found[entry_id] = (ref.domain, segment.texts([row])[0], tokens)
    return found


def segment_of(store: Store, name: str, entries: list[ToyEntry], files: Files | None) -> Path:
    return write_toy_segment(store, name, entries, files=files)


def _add(store: Store, files: Files | None) -> None:
    paths = [
        segment_of(store, "new", toy_entries([3, 50], seed=7), files),
        segment_of(store, "other", toy_entries([60, 61], seed=7), files),
    ]
    store.commit(
        add_segments=[paths[0], Addition(path=paths[1], domain="second")],
        remove_ids=[1, 3],
        message="edit",
    )


def _swap_new(store: Store, files: Files | None) -> None:
    path = segment_of(store, "newer", toy_entries(range(20, 24), seed=9), files)
    store.commit(add_segments=[path], domain="second2", swap={"second": "second2"}, message="newer")


OPERATIONS: dict[str, Callable[[Store, Files | None], object]] = {
    "add and remove": _add,
    "remove documents": lambda store, _: store.commit(remove_doc_ids=[1, 7], message="m"),
    "unplug": lambda store, _: store.unplug("second"),
    "plug": lambda store, _: store.plug("third"),
    "swap": lambda store, _: store.swap("second", "third"),
    "swap for new": _swap_new,
    "rollback": lambda store, _: store.rollback("HEAD~2"),
    "tag": lambda store, _: store.tag("release"),
    "move a tag": lambda store, _: store.tag("first", move=True),
    "compact": lambda store, _: store.compact(),
    "gc": lambda store, _: store.gc(keep_versions=1, min_age_s=0, incoming_age_s=0),
}


def prepared_store(path: Path) -> Store:
    """Three domains, one of them unplugged, removed rows, a tag, and files of no version."""
    store = Store.create(
        path, tokenizer_fingerprint="toy", entry_tokens=6, vocab_size=50, pad_token_id=0
    )
    for name, ids in (("default", range(6)), ("second", range(20, 26)), ("third", range(40, 43))):
        segment = write_toy_segment(store, name, toy_entries(ids))
        store.commit(add_segments=[segment], domain=name, message=f"add {name}")
    store.tag("first", "HEAD~2")
    store.commit(remove_ids=[5, 21], message="fewer")
    store.unplug("third")
    (path / "segments" / f"{'0' * 32}-{'1' * 12}.arrow").write_bytes(b"a writer died here")
    return store
