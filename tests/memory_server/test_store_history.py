"""The log, names of versions, differences, compaction, and collecting garbage beside writers."""

import itertools
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memory_server.errors import StoreConflict, StoreDamaged, UnknownDomain, UnknownVersion
from memory_server.store.changes import Change
from memory_server.store.compact import groups_to_rewrite
from memory_server.store.files import Files
from memory_server.store.manifest import SegmentRef, dump_manifest, new_manifest
from memory_server.store.store import Store
from tests.memory_server.store_faults import content, prepared_store
from tests.toy_memory import ToyEntry, empty_store, toy_entries, toy_store, write_toy_segment


def test_the_log_and_names_of_versions(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    log = list(store.log())
    assert [entry.message for entry in log] == [
        "unplugged third",
        "fewer",
        "add third",
        "add second",
        "add default",
        "created",
    ]
    assert [entry.entries for entry in log] == [10, 13, 15, 12, 6, 0]
    assert [entry.parent for entry in log] == [*(e.version for e in log[1:]), None]
    assert log[4].tags == ("first",)
    assert [e.version for e in store.log(2, start="HEAD~1")] == [log[1].version, log[2].version]
    names = {
        "HEAD": 0,
        "HEAD~": 1,
        "HEAD~3": 3,
        "first": 4,
        "first~1": 5,
        log[2].version: 2,
        log[2].version[:9]: 2,
        f"{log[1].version[:9]}~2": 3,
    }
    assert {name: store.resolve(name) for name in names} == {
        name: log[n].version for name, n in names.items()
    }
    assert store.manifest("first").version == log[4].version
    for name in ("HEAD~6", "f" * 16, "0" * 5, "nothing", "../HEAD", "", "~", "HEAD~x", "a/b"):
        with pytest.raises(UnknownVersion):
            store.resolve(name)


def test_a_prefix_of_two_versions_is_refused_with_both(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    head = store.manifest()
    fields = {"parent": head.version, "time": head.time, "message": "m", "segments": ()}
    alike = next(
        manifest
        for n in itertools.count()
        if (manifest := new_manifest(**fields, nonce=str(n))).version[:4] == head.version[:4]
    )
    path = store.path / "manifests" / f"{alike.version}.json"
    path.write_bytes(dump_manifest(alike))
    (store.path / "next" / head.version).write_text(f"{alike.version}\n")
    assert store.head() == alike.version
    for version in (head.version, alike.version):
        with pytest.raises(UnknownVersion, match=f"2 versions.*{version}"):
            store.resolve(version[:4])


def test_a_manifest_beside_the_line_is_no_version(tmp_path: Path) -> None:
    store, other = prepared_store(tmp_path / "s"), prepared_store(tmp_path / "other")
    stray = other.head()
    data = (other.path / "manifests" / f"{stray}.json").read_bytes()
    (store.path / "manifests" / f"{stray}.json").write_bytes(data)
    for name in (stray, stray[:8]):
        with pytest.raises(UnknownVersion):
            store.resolve(name)


def test_tags(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    store.tag("v1.0")
    assert store.tags() == {"first": store.resolve("HEAD~4"), "v1.0": store.head()}
    with pytest.raises(ValueError, match="already"):
        store.tag("v1.0", "HEAD~1")
    store.tag("v1.0", "HEAD~1", move=True)
    assert store.resolve("v1.0") == store.resolve("HEAD~1")
    store.untag("v1.0")
    with pytest.raises(UnknownVersion, match=r"v1\.0.*first"):
        store.untag("v1.0")
    for name in ("../x", "a/b", "/etc/x", ".", "..", ".tmp-x", "HEAD", "abcd", "0" * 16, "", "a b"):
        with pytest.raises(ValueError, match="tag"):
            store.tag(name)


def test_rollback_is_a_new_version(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    head, then = store.head(), content(store, "first")
    version = store.rollback("first")
    assert content(store) == then
    assert store.manifest(version).parent == head
    with pytest.raises(ValueError, match="nothing to roll back"):
        store.rollback("first")
    store.rollback(head)
    assert content(store) == content(store, head)


def test_a_difference_does_not_read_what_both_share(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    a = store.head()
    entries = [*toy_entries([70]), ToyEntry(id=3, doc_id=1, tokens=(7,) * 6, text="another")]
    store.commit(
        add_segments=[write_toy_segment(store, "x", entries)], remove_ids=[3, 4], message="edit"
    )
    unplugged = next(ref for ref in store.manifest().segments if ref.domain == "second")
    store.segment_path(unplugged).unlink()
    difference = Store.open(store.path, check=False).diff(a, "HEAD")
    assert (difference.added.tolist(), difference.removed.tolist()) == ([70], [4])
    assert difference.replaced.tolist() == [3]
    (counts,) = difference.domains.values()
    assert (counts.added, counts.removed, counts.replaced) == (1, 1, 1)
    assert store.diff(a, a).is_empty


def test_compaction_changes_nothing_but_segments(tmp_path: Path) -> None:
    store = empty_store(tmp_path / "s")
    for n in range(6):
        segment = write_toy_segment(store, "x", toy_entries(range(10 * n, 10 * n + 10), seed=n))
        store.commit(add_segments=[segment], domain="ab"[n % 2], message="m")
    store.commit(remove_ids=[0, 11, 22, 33, 59], message="fewer")
    a, before = store.head(), content(store)
    dry = store.compact(dry_run=True)
    assert store.head() == a
    done = store.compact()
    assert (dry.segments_before, dry.segments_after, dry.rows_dropped) == (6, 2, 5)
    assert done.segments_after == len(store.manifest().segments) == 2
    assert [ref.deleted for ref in store.manifest().segments] == [0, 0]
    assert content(store) == before
    assert store.diff(a, "HEAD").is_empty
    titles = store.segment(store.manifest().segments[0]).strings("title", [3])
    assert titles == ["title 4"]
    assert store.compact().version is None
    assert list(store.incoming.iterdir()) == []
    with pytest.raises(UnknownDomain, match="c"):
        store.compact(domains=["c"])
    store.verify(all_versions=True)


def test_large_whole_segments_are_left_alone() -> None:
    def ref(rows: int, deleted: int = 0, domain: str = "a") -> SegmentRef:
        return SegmentRef(
            file="f",
            domain=domain,
            rows=rows,
            bytes=1,
            sha256="s",
            min_id=0,
            max_id=1,
            deleted=deleted,
        )

    segments = [ref(90), ref(10), ref(60, 5), ref(5, domain="b"), ref(50), ref(49), ref(10)]
    groups = groups_to_rewrite(segments, target_rows=100, domains=None)
    assert groups == [[1, 2], [5, 6]]


def test_compaction_does_not_hallow_damage(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    path = store.segment_path(store.manifest().segments[0])
    data = bytearray(path.read_bytes())
    data[data.index(b"text 2 of")] ^= 1
    path.write_bytes(data)
    head = store.head()
    with pytest.raises(StoreDamaged, match=path.name):
        store.compact()
    assert store.head() == head


def test_garbage_goes_and_what_is_kept_stays(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    versions = [entry.version for entry in store.log()]
    third = next(ref for ref in store.manifest(versions[2]).segments if ref.domain == "third")
    assert store.gc(keep_versions=2).version is not None  # the file of no version goes
    assert store.gc(keep_versions=2).version is None  # all versions are young
    dry = store.gc(keep_versions=1, min_age_s=0, protect=[versions[3]], dry_run=True)
    assert store.segment_path(third).exists()
    report = store.gc(keep_versions=1, min_age_s=0, protect=[versions[3]])
    assert report.files == dry.files
    assert set(dry.collected) == set(report.collected) == {versions[n] for n in (0, 1, 2, 5)}
    assert not store.segment_path(third).exists()
    assert {0, 5, 20, 21} <= content(store, versions[3]).keys()
    assert content(store).keys() == {0, 1, 2, 3, 4, 20, 22, 23, 24, 25}
    for n in (0, 1, 2, 5):
        with pytest.raises(UnknownVersion, match="given up"):
            store.manifest(versions[n])
        with pytest.raises(UnknownVersion, match="given up"):
            store.rollback(versions[n])
    assert content(store, "first").keys() == set(range(6))
    with pytest.raises(UnknownDomain, match="third"):
        store.plug("third")
    log = list(store.log())
    assert [entry.version for entry in log if entry.version in versions] == versions
    assert [entry.collected for entry in log if entry.version in versions] == [
        version in report.collected for version in versions
    ]
    store.verify(all_versions=True)
    with pytest.raises(ValueError, match="keep_versions=0"):
        store.gc(keep_versions=0)
    # A second collection remembers what the first gave up.
    store.untag("first")
    store.gc(keep_versions=1, min_age_s=0)
    assert (
        sum(entry.collected for entry in store.log()) == len(versions) + 1
    )  # and the first collection's
    assert len(list((store.path / "collected").iterdir())) == 1


def test_old_leftovers_of_writers_go(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    old, young = store.incoming / "old.arrow", store.incoming / "young.arrow"
    torn = store.path / "manifests" / ".tmp-x"
    for path in (old, young, torn):
        path.write_bytes(b"half")
    long_ago = time.time() - 3 * 86_400
    for path in (old, torn):
        os.utime(path, (long_ago, long_ago))
    store.gc()
    assert [path.exists() for path in (old, young, torn)] == [False, True, False]


class MeetsAWriter(Files):
    """Lets somebody else do something just before a commit, or a tag, becomes visible."""

    def __init__(self, at: str = "next") -> None:
        self.at = at
        self.meanwhile = lambda: None

    def link(self, source: Path, target: Path) -> None:
        if target.parent.name == self.at:
            act, self.meanwhile = self.meanwhile, lambda: None
            act()
        super().link(source, target)


@pytest.mark.parametrize("change", ["add", "rollback", "plug"])
def test_a_collection_and_a_writer_cannot_miss_each_other(tmp_path: Path, change: str) -> None:
    store = prepared_store(tmp_path / "s")
    files = MeetsAWriter()
    writer = Store.open(store.path, files=files)
    files.meanwhile = lambda: store.gc(keep_versions=1, min_age_s=0, incoming_age_s=3600)
    path = write_toy_segment(store, "n", toy_entries([90]))
    acts = {
        "add": lambda: writer.commit(add_segments=[path], message="slow"),
        "rollback": lambda: writer.rollback("HEAD~2"),
        "plug": lambda: writer.plug("third"),
    }
    # Its files are there, and what it brings back is about to go.
    with pytest.raises(StoreConflict):
        acts[change]()
    store.verify(all_versions=True)
    if change == "add":
        acts[change]()
        assert 90 in content(store)
    else:
        with pytest.raises((UnknownVersion, UnknownDomain)):
            writer.plug("third")
    store.verify(all_versions=True)


def test_a_collection_that_loses_removes_nothing(tmp_path: Path) -> None:
    store, collector = prepared_store(tmp_path / "s"), MeetsAWriter()

    class Overtakes(Files):
        """Becomes visible after a collection has looked, and before it commits."""

        def link(self, source: Path, target: Path) -> None:
            if target.parent.name == "next":
                collector.meanwhile = lambda: Files.link(self, source, target)
                with pytest.raises(StoreConflict):
                    Store.open(store.path, files=collector).gc(keep_versions=1, min_age_s=0)
            super().link(source, target)

    path = write_toy_segment(store, "n", toy_entries([90]))
    writer = Store.open(store.path, files=Overtakes())
    writer.commit(add_segments=[path], plug=["third"], message="just before")
    store.verify(all_versions=True)
    assert {40, 41, 42, 90} <= content(store).keys()
    assert not any(entry.collected for entry in store.log())


def test_a_writer_that_slept_through_commits_and_a_collection_is_told(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    plan, base = store.plan(Change.of(remove_ids=[0])), store.head()
    for entry_id in (1, 2, 3):
        store.commit(remove_ids=[entry_id], message="m")
    store.gc(keep_versions=1, min_age_s=0)
    head = store.head()
    with pytest.raises(StoreConflict):
        store.publish(plan, message="late")
    # And a HEAD that it writes late leads to the same place.
    (store.path / "HEAD").write_text(f"{base}\n")
    assert Store.open(store.path).head() == head
    (store.path / "HEAD").unlink()
    assert Store.open(store.path).head() == head


def test_a_tag_made_during_a_collection_keeps_its_version(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    version, files = store.resolve("HEAD~2"), MeetsAWriter()
    wanted = content(store, version)
    files.meanwhile = lambda: store.tag("just", version)
    report = Store.open(store.path, files=files).gc(keep_versions=1, min_age_s=0)
    assert version not in report.collected
    assert content(store, "just") == wanted
    store.verify(all_versions=True)


def test_a_tag_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    store, files = prepared_store(tmp_path / "s"), MeetsAWriter("tags")
    files.meanwhile = lambda: store.gc(keep_versions=1, min_age_s=0)
    with pytest.raises(UnknownVersion, match="given up"):
        Store.open(store.path, files=files).tag("late", "HEAD~2")
    assert list(store.tags()) == ["first"]
    store.verify(all_versions=True)


def test_a_plan_published_twice_at_once_loses_no_file(tmp_path: Path) -> None:
    store, files = prepared_store(tmp_path / "s"), MeetsAWriter()
    elsewhere = tmp_path / "new.arrow"
    write_toy_segment(store, "n", toy_entries([90])).rename(elsewhere)
    plan = store.plan(Change.of(add=[elsewhere], remove_ids=[0]))
    files.meanwhile = lambda: store.publish(plan, message="the first")
    with pytest.raises(StoreConflict):
        Store.open(store.path, files=files).publish(plan, message="the second")
    store.verify(all_versions=True)
    assert store.manifest().message == "the first"
    assert 90 in content(store)


def test_writers_readers_and_collections_at_once(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(200)))
    wrong: list[BaseException] = []
    done: list[int] = []

    def write(ids: list[int]) -> None:
        mine = Store.open(store.path)
        for number, entry_id in enumerate(ids):
            while True:
                try:
                    name = f"{entry_id}"
                    path = write_toy_segment(mine, name, toy_entries([1000 + entry_id]))
                    mine.commit(add_segments=[path], remove_ids=[entry_id], message="m")
                    done.append(entry_id)
                    if number % 4 == 3:
                        mine.compact()
                    break
                except StoreConflict:
                    if entry_id in done:
                        break
                except BaseException as error:
                    wrong.append(error)
                    return

    def collect() -> None:
        for _ in range(12):
            try:
                store.gc(keep_versions=3, min_age_s=0, incoming_age_s=3600)
            except StoreConflict:
                pass
            except BaseException as error:
                wrong.append(error)

    numbers = np.arange(200)
    threads = [threading.Thread(target=write, args=(numbers[n::8][:8].tolist(),)) for n in range(3)]
    threads.append(threading.Thread(target=collect))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gone = {int(i) for n in range(3) for i in numbers[n::8][:8]}
    assert set(content(store)) == (set(range(200)) - gone) | {1000 + i for i in gone}
    store.verify(all_versions=True)
