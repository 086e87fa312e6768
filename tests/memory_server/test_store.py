"""The durable store: versions, refusals, damage, rival writers, and a crash at every step."""

import threading
from pathlib import Path

import numpy as np
import pytest

from memory_server.errors import (
    DuplicateEntry,
    StoreConflict,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    TokenizerMismatch,
    UnknownEntry,
    UnknownVersion,
)
from memory_server.store.files import Files
from memory_server.store.segments import Segment, SegmentMeta, write_segment
from memory_server.store.store import Store
from tests.toy_memory import (
    ENTRY_TOKENS,
    PAD,
    VOCAB,
    ToyEntry,
    empty_store,
    toy_entries,
    toy_store,
    write_toy_segment,
)


def live_ids(store: Store, version: str | None = None) -> list[int]:
    return sorted(
        int(i)
        for ref in store.manifest(version).segments
        for i in np.delete(store.segment(ref).ids, store.deleted_rows(ref))
    )


def test_versions_stay_what_they_were(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)), toy_entries(range(10, 14)))
    first = store.head()
    second = store.commit(remove_ids=[1, 12], message="fewer")
    third = store.commit(
        add_segments=[write_toy_segment(store, "x", toy_entries([12, 99]))],
        remove_ids=range(5, 5),
        message="more",
        domain="extra",
    )
    store = Store.open(tmp_path / "s")
    assert store.head() == third
    assert live_ids(store, first) == [0, 1, 2, 3, 4, 10, 11, 12, 13]
    assert live_ids(store, second) == [0, 2, 3, 4, 10, 11, 13]
    assert live_ids(store) == [0, 2, 3, 4, 10, 11, 12, 13, 99]
    assert store.manifest().entries == 9
    assert (store.manifest().parent, store.manifest().message) == (second, "more")
    assert store.manifest().segments[-1].domain == "extra"
    store.verify()
    store.verify(first)
    assert list(store.incoming.iterdir()) == []


def test_an_entry_is_replaced_in_one_commit(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)))
    new = ToyEntry(id=3, doc_id=1, tokens=(7,) * ENTRY_TOKENS, text="new")
    segment = write_toy_segment(store, "x", [new])
    with pytest.raises(DuplicateEntry, match="3"):
        store.commit(add_segments=[segment], message="no removal")
    store.commit(add_segments=[segment], remove_ids=[3], message="edit")
    assert live_ids(store) == [0, 1, 2, 3, 4]
    replaced = store.segment(store.manifest().segments[-1])
    assert replaced.texts([0]) == ["new"]
    store.commit(remove_ids=[3], message="the new one goes")
    assert live_ids(store) == [0, 1, 2, 4]


def test_segments_are_read_without_copying(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(50)))
    segment = store.segment(store.manifest().segments[0])
    assert segment.tokens.dtype == np.uint16
    for array in (segment.ids, segment.doc_ids, segment.tokens):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_a_segment_from_elsewhere_is_copied(tmp_path: Path) -> None:
    store = empty_store(tmp_path / "s")
    elsewhere = tmp_path / "mine.arrow"
    write_toy_segment(store, "x", toy_entries([4])).rename(elsewhere)
    store.commit(add_segments=[elsewhere], message="copy")
    elsewhere.write_bytes(b"changed later")
    store.verify()


def test_bad_segments_are_refused_and_change_nothing(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)))
    head, one = store.head(), toy_entries([7])

    def segment(**changes: object) -> Path:
        meta = {
            "tokenizer_fingerprint": "toy",
            "vocab_size": VOCAB,
            "entry_tokens": ENTRY_TOKENS,
            "pad_token_id": PAD,
            **changes,
        }
        path = tmp_path / "bad.arrow"
        width = int(str(meta["entry_tokens"]))
        write_segment(
            path,
            ids=[7],
            doc_ids=[1],
            tokens_NS=np.ones((1, width), dtype=int),
            texts=[""],
            titles=[""],
            sources=[""],
            meta=SegmentMeta(**meta),  # type: ignore[arg-type]
        )
        return path

    with pytest.raises(TokenizerMismatch, match=r"other.*toy"):
        store.commit(add_segments=[segment(tokenizer_fingerprint="other")], message="m")
    with pytest.raises(ValueError, match="entry_tokens=9"):
        store.commit(add_segments=[segment(entry_tokens=9)], message="m")
    twice = [write_toy_segment(store, name, one) for name in ("a", "b")]
    with pytest.raises(DuplicateEntry, match="7"):
        store.commit(add_segments=twice, message="m")
    with pytest.raises(UnknownEntry, match="77"):
        store.commit(remove_ids=[2, 77], message="m")
    with pytest.raises(ValueError, match="nothing to commit"):
        store.commit(message="m")
    (tmp_path / "text.arrow").write_text("not arrow")
    with pytest.raises(StoreDamaged, match=r"text\.arrow"):
        store.commit(add_segments=[tmp_path / "text.arrow"], message="m")
    with pytest.raises(StoreDamaged, match=r"absent\.arrow"):
        store.commit(add_segments=[tmp_path / "absent.arrow"], message="m")
    assert store.head() == head
    assert live_ids(Store.open(tmp_path / "s")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ids": [1, 1]}, DuplicateEntry, "more than once"),
        ({"ids": [1, -2]}, ValueError, "negative"),
        ({"ids": [0.5, 1.0]}, ValueError, "integers"),
        ({"doc_ids": [1]}, ValueError, "1 rows but ids has 2"),
        ({"titles": ["a"]}, ValueError, "1 rows but ids has 2"),
        ({"tokens_NS": np.ones((2, 3), dtype=int)}, ValueError, "shape"),
        ({"tokens_NS": np.full((2, ENTRY_TOKENS), VOCAB)}, ValueError, "tokenizer"),
        ({"tokens_NS": np.full((2, ENTRY_TOKENS), -1)}, ValueError, "tokenizer"),
    ],
)
def test_write_segment_refuses(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    arguments: dict[str, object] = {
        "ids": [1, 2],
        "doc_ids": [0, 0],
        "tokens_NS": np.ones((2, ENTRY_TOKENS), dtype=int),
        "texts": ["", ""],
        "titles": ["", ""],
        "sources": ["", ""],
        "meta": SegmentMeta(
            tokenizer_fingerprint="toy",
            vocab_size=VOCAB,
            entry_tokens=ENTRY_TOKENS,
            pad_token_id=PAD,
        ),
        **changes,
    }
    with pytest.raises(error, match=words):
        write_segment(tmp_path / "x.arrow", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_large_vocabulary_is_stored_wide(tmp_path: Path) -> None:
    meta = SegmentMeta(
        tokenizer_fingerprint="t", vocab_size=100_000, entry_tokens=2, pad_token_id=0
    )
    info = write_segment(
        tmp_path / "x.arrow",
        ids=[1],
        doc_ids=[0],
        tokens_NS=[[99_999, 3]],
        texts=["é"],
        titles=[""],
        sources=[""],
        meta=meta,
    )
    segment = Segment(tmp_path / "x.arrow")
    assert segment.tokens.tolist() == [[99_999, 3]]
    assert segment.texts([0]) == ["é"]
    assert segment.info == info


def test_no_store_and_a_second_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="corpus build"):
        Store.open(tmp_path)
    empty_store(tmp_path / "s")
    with pytest.raises(StoreError, match="already"):
        empty_store(tmp_path / "s")
    store = Store.open(tmp_path / "s")
    assert store.manifest().entries == 0
    for version in ("0" * 16, "../HEAD"):
        with pytest.raises(UnknownVersion):
            store.manifest(version)


@pytest.mark.parametrize("kind", ["segments", "deletions", "manifests"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)))
    store.commit(remove_ids=[2], message="m")
    manifest = store.manifest()
    ref = manifest.segments[0]
    name = {
        "segments": ref.file,
        "deletions": str(ref.deletions),
        "manifests": f"{manifest.version}.json",
    }[kind]
    path = store.path / kind / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-20])
    else:
        position = data.index(b"fewer"[:1]) if kind == "segments" else len(data) // 2
        data[position] ^= 1
        path.write_bytes(data)
    words = manifest.version if (kind, damage) == ("manifests", "missing") else name
    with pytest.raises(StoreError, match=words):
        Store.open(store.path).verify()


def test_of_two_writers_one_is_told(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)))
    base = store.head()
    store.commit(remove_ids=[1], message="first", parent=base)
    with pytest.raises(StoreConflict, match=base):
        Store.open(store.path).commit(remove_ids=[2], message="second", parent=base)
    assert live_ids(store) == [0, 2, 3, 4]


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(100)))
    conflicts = []

    def remove(ids: range) -> None:
        mine = Store.open(store.path)
        for entry_id in ids:
            while True:
                try:
                    mine.commit(remove_ids=[entry_id], message=f"remove {entry_id}")
                    break
                except StoreConflict as error:
                    conflicts.append(error)

    threads = [threading.Thread(target=remove, args=(range(n, 100, 20),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live_ids(store) == [i for i in range(100) if i % 20 > 3]
    # Losers leave nothing behind, and every version has one child.
    assert len(list((store.path / "manifests").iterdir())) == 2 + 20
    assert len(list(store.log())) == 2 + 20


class CrashingFiles(Files):
    """Stops at the nth write, sync, rename or link, as a dying process does: no clean-up."""

    class Crash(BaseException):
        pass

    def __init__(self, survive: int) -> None:
        self.left = survive

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.Crash

    def open_new(self, path: Path):  # type: ignore[no-untyped-def]
        self._step()
        return super().open_new(path)

    def sync(self, handle) -> None:  # type: ignore[no-untyped-def]
        if self.left == 0 and handle.writable():  # half of the bytes had reached the disk
            handle.flush()
            handle.truncate(handle.tell() // 2)
        self._step()
        super().sync(handle)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        super().link(source, target)

    def remove(self, path: Path) -> None:
        if self.left >= 0:
            super().remove(path)

    def sync_directory(self, directory: Path) -> None:
        self._step()
        super().sync_directory(directory)


def test_a_crash_at_any_step_of_a_commit_leaves_the_old_version_or_the_new(tmp_path: Path) -> None:
    outcomes = []
    for survive in range(200):
        path = tmp_path / str(survive)
        store = toy_store(path, toy_entries(range(5)))
        new = write_toy_segment(store, "x", toy_entries([3, 50]))
        files = CrashingFiles(survive)
        crashed = False
        try:
            Store.open(path, files=files).commit(
                add_segments=[new], remove_ids=[1, 3], message="edit"
            )
        except CrashingFiles.Crash:
            crashed = True
        reopened = Store.open(path)
        reopened.verify()
        outcomes.append(live_ids(reopened))
        assert outcomes[-1] in ([0, 1, 2, 3, 4], [0, 2, 3, 4, 50])
        if not crashed:
            break
        # And the store can be written to: the same commit again, or the next one.
        if 50 not in outcomes[-1]:
            again = write_toy_segment(reopened, "again", toy_entries([3, 50]))
            reopened.commit(add_segments=[again], remove_ids=[1, 3], message="again")
        assert live_ids(Store.open(path)) == [0, 2, 3, 4, 50]
    assert not crashed
    assert len(outcomes) > 10
    assert outcomes[0] == [0, 1, 2, 3, 4]
