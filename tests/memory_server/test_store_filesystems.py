"""The same store elsewhere: fsspec's memory, what pyarrow wraps, and filesystems that cannot."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as arrow_fs

from memory_server.errors import (
    StoreConflict,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    StoreReadOnly,
    UnknownVersion,
)
from memory_server.store.remote_storage import RemoteStorage
from memory_server.store.segment_cache import default_cache
from memory_server.store.store import Store
from tests.memory_server.store_faults import content
from tests.toy_memory import empty_store, toy_entries, write_toy_segment


class OwnMemory(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's memory, but not the one that the whole process shares."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


class NoCondition(OwnMemory):
    """Takes mode="create" and writes over what is there, as an old server does."""

    protocol = "s3"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value)


Place = Callable[[Path], dict[str, Any]]

PLACES: dict[str, Place] = {
    "local": lambda tmp: {"path": tmp / "s"},
    "file URL": lambda tmp: {"path": f"file://{tmp}/s"},
    "memory URL": lambda tmp: {"path": f"memory://{tmp.name}/s", "cache": tmp / "cache"},
    "fsspec": lambda tmp: {"path": "a/s", "filesystem": OwnMemory(), "cache": tmp / "cache"},
    "pyarrow local": lambda tmp: {
        "path": str(tmp / "s"),
        "filesystem": arrow_fs.LocalFileSystem(),
    },
    "pyarrow subtree": lambda tmp: {
        "path": "s",
        "filesystem": arrow_fs.SubTreeFileSystem(str(tmp), arrow_fs.LocalFileSystem()),
    },
    "fsspec over pyarrow": lambda tmp: {
        "path": str(tmp / "s"),
        "filesystem": ArrowFSWrapper(arrow_fs.LocalFileSystem()),
    },
    "pyarrow over fsspec": lambda tmp: {
        "path": "a/s",
        "filesystem": arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(OwnMemory())),
        "cache": tmp / "cache",
    },
}


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return PLACES[request.param](tmp_path)


def test_a_store_on_every_filesystem(place: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        Store.open(**place)
    store = empty_store(**place)
    first = [
        write_toy_segment(store, name, toy_entries(ids))
        for name, ids in (("a", range(5)), ("b", range(10, 14)))
    ]
    store.commit(add_segments=first, message="first")
    parent = store.head()
    elsewhere = tmp_path / "mine.arrow"
    write_toy_segment(store, "c", toy_entries([50])).rename(elsewhere)
    store.commit(add_segments=[elsewhere], remove_ids=[1, 12], domain="other", message="edit")
    store.tag("good")
    with pytest.raises(StoreConflict):
        Store.open(**place).commit(remove_ids=[2], message="late", parent=parent)
    store.unplug("other")
    store.compact()
    store.rollback("good")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    store = Store.open(**place)
    assert sorted(content(store)) == [0, 2, 3, 4, 10, 11, 13, 50]
    assert sorted(content(store, parent)) == [0, 1, 2, 3, 4, 10, 11, 12, 13]
    assert [entry.message.split()[0] for entry in store.log()] == [
        "rolled",
        "compacted",
        "unplugged",
        "edit",
        "first",
        "created",
    ]
    assert store.gc(keep_versions=1, min_age_s=0).bytes > 0
    with pytest.raises(UnknownVersion, match="given up"):
        store.manifest(parent)
    store.verify(all_versions=True)
    assert sorted(content(Store.open(**place))) == [0, 2, 3, 4, 10, 11, 13, 50]
    with pytest.raises(StoreError, match="already"):
        empty_store(**place)


def test_rival_writers_on_every_filesystem(place: dict[str, Any]) -> None:
    store = empty_store(**place)
    store.commit(add_segments=[write_toy_segment(store, "a", toy_entries(range(40)))], message="m")

    def remove(ids: range) -> None:
        mine = Store.open(**place)
        for entry_id in ids:
            while True:
                try:
                    mine.commit(remove_ids=[entry_id], message="m")
                    break
                except StoreConflict:
                    continue

    threads = [threading.Thread(target=remove, args=(range(n, 24, 4),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(content(store)) == list(range(24, 40))
    assert len(list(store.log())) == 2 + 24


def test_segments_are_fetched_once_and_checked(tmp_path: Path) -> None:
    filesystem = OwnMemory()
    place = {"path": "s", "filesystem": filesystem, "cache": tmp_path / "cache"}
    store = empty_store(**place)
    store.commit(add_segments=[write_toy_segment(store, "a", toy_entries(range(9)))], message="m")
    (ref,) = store.manifest().segments
    assert not list((tmp_path / "cache").glob("segments/*"))
    store.segment(ref)
    (copy,) = (tmp_path / "cache" / "segments").iterdir()
    assert copy.name == f"{ref.sha256}.arrow"
    remote = next(name for name in filesystem.store if name.endswith(ref.file))
    data = bytearray(filesystem.cat_file(remote))
    data[data.index(b"text 3 of")] ^= 1
    filesystem.pipe_file(remote, bytes(data))
    assert store.segment(ref).texts([3]) == ["text 3 of 0"]  # from the copy
    with pytest.raises(StoreDamaged, match=ref.file):
        store.verify()
    copy.unlink()
    with pytest.raises(StoreDamaged, match=ref.file):
        store.segment(ref)
    assert list((tmp_path / "cache" / "segments").iterdir()) == []
    filesystem.pipe_file(remote, bytes(data[:-9]))
    with pytest.raises(StoreDamaged, match=ref.file):
        Store.open(**place)
    filesystem.rm_file(remote)
    with pytest.raises(StoreDamaged, match=ref.file):
        Store.open(**place)


def test_a_filesystem_that_cannot_decide_between_writers_is_only_read(tmp_path: Path) -> None:
    mock = arrow_fs._MockFileSystem()
    mock.create_dir("s")
    lock = threading.Lock()

    def create(filesystem: Any, path: str, data: bytes) -> None:
        with lock:
            if filesystem.exists(path):
                raise FileExistsError(path)
            filesystem.pipe_file(path, data)

    place = {"path": "s", "filesystem": mock, "cache": tmp_path / "cache"}
    with pytest.raises(StoreReadOnly, match="exclusive_create"):
        empty_store(**place)
    store = empty_store(**place, exclusive_create=create)
    store.commit(add_segments=[write_toy_segment(store, "a", toy_entries(range(9)))], message="m")
    reader = Store.open(**place)
    assert sorted(content(reader)) == list(range(9))
    with pytest.raises(StoreReadOnly):
        reader.commit(remove_ids=[1], message="m")
    assert sorted(content(reader)) == list(range(9))
    with pytest.raises(StoreReadOnly, match="there already"):
        empty_store("s", filesystem=NoCondition(), cache=tmp_path / "cache")


def test_a_put_whose_answer_was_lost_counts(tmp_path: Path) -> None:
    lost = {"next": 0}

    def create(filesystem: Any, path: str, data: bytes) -> None:
        if filesystem.exists(path):
            raise FileExistsError(path)
        filesystem.pipe_file(path, data)
        if "/next/" in path and ".probe" not in path:
            lost["next"] += 1
            raise [FileExistsError, TimeoutError][lost["next"] % 2](path)

    place = {"path": "s", "filesystem": OwnMemory(), "cache": tmp_path / "cache"}
    store = empty_store(**place, exclusive_create=create)
    store.commit(add_segments=[write_toy_segment(store, "a", toy_entries(range(9)))], message="m")
    store.commit(remove_ids=[1], message="m")
    assert lost["next"] == 3
    assert sorted(content(store)) == [0, *range(2, 9)]
    store.verify(all_versions=True)


class DyingStorage(RemoteStorage):
    """Ends before, or after, its nth change of the remote files."""

    left, after = 1 << 30, False

    class Gone(BaseException):
        pass

    def _step(self, act: Callable[[], None]) -> None:
        self.left -= 1
        if self.left < 0 and not (self.after and self.left == -1):
            raise self.Gone
        act()
        if self.left == -1:
            raise self.Gone

    def write(self, name: str, data: bytes) -> None:
        self._step(lambda: super(DyingStorage, self).write(name, data))

    def create(self, name: str, data: bytes) -> None:
        self._step(lambda: super(DyingStorage, self).create(name, data))

    def adopt(self, source: Path, name: str, *, share: bool) -> None:
        self._step(lambda: super(DyingStorage, self).adopt(source, name, share=share))

    def remove(self, name: str) -> None:
        self._step(lambda: super(DyingStorage, self).remove(name))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("operation", ["edit", "gc", "compact", "tag"])
def test_a_remote_writer_that_dies_at_any_step(tmp_path: Path, operation: str, after: bool) -> None:
    from memory_server.store.files import Files

    for survive in range(40):
        filesystem = OwnMemory()
        place = {"filesystem": filesystem, "cache": tmp_path / "cache"}
        store = empty_store("s", **place)
        segment = write_toy_segment(store, "a", toy_entries(range(9)))
        store.commit(add_segments=[segment], message="m")
        store.commit(remove_ids=[8], message="m")
        storage = DyingStorage(
            filesystem, "s", location="memory://s", cache=tmp_path / "cache", files=Files()
        )
        mine = Store.open(storage)
        storage.left, storage.after = survive, after
        new = write_toy_segment(mine, "n", toy_entries([3, 50], seed=3))
        acts: dict[str, Callable[[], object]] = {
            "edit": lambda new=new, mine=mine: mine.commit(
                add_segments=[new], remove_ids=[3, 1], message="edit"
            ),
            "gc": lambda mine=mine: mine.gc(keep_versions=1, min_age_s=0),
            "compact": lambda mine=mine: mine.compact(),
            "tag": lambda mine=mine: mine.tag("x"),
        }
        died = False
        try:
            acts[operation]()
        except DyingStorage.Gone:
            died = True
        store = Store.open("s", **place)
        store.verify(all_versions=True)
        old, edited = set(range(8)), {0, 2, 3, 4, 5, 6, 7, 50}
        assert set(content(store)) in ((old, edited) if operation == "edit" else (old,))
        store.commit(remove_ids=[0], message="and it goes on")
        store.gc(keep_versions=1, min_age_s=0)
        store.verify(all_versions=True)
        if not died:
            break
    assert not died
    assert survive >= (1 if operation == "tag" else 4)


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    store = empty_store("memory://env-cache/s")
    assert store.incoming.is_relative_to(tmp_path / "mine")
    assert store.location == "memory://env-cache/s"
    with pytest.raises(StoreError, match="location"):
        _ = store.path


def test_paths_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing://"):
        Store.open("nothing://bucket/store")
    with pytest.raises(ValueError, match=r"\.\."):
        Store.open("../s", filesystem=fsspec.filesystem("memory"))
    with pytest.raises(ValueError, match="neither"):
        Store.open("s", filesystem=object())
