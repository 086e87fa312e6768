"""A step of an operation fails, finds no room, or is the last thing that its process does: the
store is as before or as after, whole, and the operation can be tried again."""

import errno
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest

from memory_server.errors import StoreError, StoreFull, StoreNotFound
from memory_server.store.files import Files
from memory_server.store.store import Store
from tests.memory_server.store_faults import (
    OPERATIONS,
    Content,
    FaultyFiles,
    Gone,
    content,
    prepared_store,
)
from tests.toy_memory import empty_store

FIRST_VERSIONS = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_store(tmp_path_factory.mktemp("prepared") / "store").path


def _state(store: Store) -> tuple[Content, dict[str, str], int, list[bool]]:
    """What operations change: entries, tags, removed rows, which first versions are given up."""
    removed = sum(ref.deleted for ref in store.manifest().segments)
    collected = [entry.collected for entry in store.log()][::-1]
    return content(store), store.tags(), removed, collected[:FIRST_VERSIONS]


def _files(path: Path) -> dict[str, bytes]:
    """All that a store takes room for, but for what its caller wrote into `incoming`."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.parent.name != "incoming"
    }


@pytest.mark.parametrize("how", ["fails", "unsure", "full", "dies", "done"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_fault_at_any_step(tmp_path: Path, prepared: Path, name: str, how: str) -> None:
    operation = OPERATIONS[name]
    before = _state(Store.open(prepared))
    clean = shutil.copytree(prepared, tmp_path / "clean")
    operation(Store.open(clean), None)
    after = _state(Store.open(clean))
    assert before != after
    at, ended_before, ended_after = 0, 0, 0
    while True:
        path = shutil.copytree(prepared, tmp_path / f"at-{at}")
        files = FaultyFiles(at, how)
        caught: BaseException | None = None
        try:
            operation(Store.open(path, files=files), files)
        except (Gone, OSError, StoreError) as error:
            caught = error
        store = Store.open(path)
        store.verify(all_versions=True)
        state = _state(store)
        assert state in (before, after), f"at step {at}"
        if caught is None:
            assert state == after
        if how == "full" and caught is not None:
            assert isinstance(caught, StoreFull)
            assert str(path) in str(caught)
            assert "nothing changed" in str(caught)
            assert state == before
            # Not a byte: where there is no room, every leftover makes it worse.
            assert _files(path) == _files(prepared)
        ended_before += state == before
        ended_after += state == after
        if state == before:
            operation(store, None)
        store = Store.open(path)
        store.verify(all_versions=True)
        assert _state(store) == after
        shutil.rmtree(path)
        if files.steps <= at and not files.is_gone:
            break
        at += 1
    assert at >= 3
    assert ended_after
    assert ended_before or name == "gc"


@pytest.mark.parametrize("how", ["fails", "unsure", "full", "dies", "done"])
def test_a_fault_at_any_step_of_the_creation(tmp_path: Path, how: str) -> None:
    at = 0
    while True:
        path, files = tmp_path / f"at-{at}", FaultyFiles(at, how)
        try:
            empty_store(path, files=files)
        except (Gone, OSError, StoreError):
            try:
                Store.open(path)
            except StoreNotFound:
                empty_store(path)
        store = Store.open(path)
        store.verify(all_versions=True)
        assert content(store) == {}
        with pytest.raises(StoreError, match="already"):
            empty_store(path)
        assert len(list(store.log())) == 1
        if files.steps <= at and not files.is_gone:
            break
        at += 1
    assert at > 10


def test_what_crashes_leave_is_swept(tmp_path: Path, prepared: Path) -> None:
    operation = OPERATIONS["add and remove"]
    path = shutil.copytree(prepared, tmp_path / "s")
    for at in range(0, 60, 3):
        files = FaultyFiles(at, "dies")
        try:
            operation(Store.open(path, files=files), files)
        except Gone:
            continue
        break
    store = Store.open(path)
    kept = content(store)
    report = store.gc(keep_versions=1, min_age_s=0, incoming_age_s=0)
    assert report.bytes > 0
    store = Store.open(path)
    store.verify(all_versions=True)
    assert content(store) == kept
    named = {ref.file for v in ("HEAD", "first") for ref in store.manifest(v).segments}
    assert {file.name for file in (path / "segments").iterdir()} == named
    assert list((path / "incoming").iterdir()) == []
    assert len(list((path / "manifests").iterdir())) == 3
    assert not list(path.rglob(".tmp-*"))


class FullDisk(Files):
    """Has no room for a new file while the directory holds more than this."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most

    def open_new(self, path: Path) -> BinaryIO:
        if sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) > self.most:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().open_new(path)


def test_a_collection_makes_room_on_a_full_disk(tmp_path: Path, prepared: Path) -> None:
    path = shutil.copytree(prepared, tmp_path / "s")
    taken = sum(len(data) for data in _files(path).values())
    store = Store.open(path, files=FullDisk(path, taken + 10_000))
    for name in ("incoming/new.arrow", "segments/.tmp-x"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"a writer found no room for the rest" * 1000)
    with pytest.raises(StoreFull):
        store.unplug("second")
    report = store.gc(keep_versions=1, min_age_s=0, incoming_age_s=0)
    assert {"incoming/new.arrow", "segments/.tmp-x"} < set(report.files)
    assert report.collected
    Store.open(path).verify(all_versions=True)


def test_what_a_person_may_remove_from_a_full_disk_is_named(tmp_path: Path, prepared: Path) -> None:
    path = shutil.copytree(prepared, tmp_path / "s")
    before = _files(path)
    torn = path / "segments" / f"{'0' * 32}-{'1' * 12}.arrow"
    torn.write_bytes(b"a writer died here" * 100)
    taken = sum(len(data) for data in _files(path).values())
    store = Store.open(path, files=FullDisk(path, taken - 1))
    with pytest.raises(StoreFull, match="remove by hand") as told:
        store.gc(keep_versions=1, min_age_s=0)
    named = [file for file in path.rglob("*.*") if str(file) in str(told.value).split("hand")[1]]
    assert named == [torn]
    torn.unlink()
    assert store.gc(keep_versions=1, min_age_s=0).collected
    Store.open(path).verify(all_versions=True)
    assert len(_files(path)) < len(before)
