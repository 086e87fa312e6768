"""Domains and documents as one commit changes them, planned, and against a plain dictionary."""

from pathlib import Path

import numpy as np
import pytest

from memory_server.errors import (
    DomainPlugged,
    DuplicateEntry,
    MemoryServerError,
    StoreConflict,
    StoreDamaged,
    UnknownDomain,
    UnknownEntry,
)
from memory_server.store.changes import Addition, Change, Plug
from tests.memory_server.store_faults import content, prepared_store
from tests.toy_memory import empty_store, toy_entries, write_toy_segment


def _files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_domain_goes_and_comes_back_as_it_was(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    whole = content(store)
    assert {domain for domain, _, _ in whole.values()} == {"default", "second"}
    store.unplug("second")
    rest = {i: e for i, e in whole.items() if e[0] != "second"}
    assert content(store) == rest
    store.plug("second")  # without the row that was removed before it was unplugged
    assert content(store) == whole
    store.swap("default", "third")
    assert {e[0] for e in content(store).values()} == {"second", "third"}
    store.commit(
        remove_domains=["second"],
        plug=[Plug(domain="second", from_version="HEAD~4"), "default"],
        message="second as it once was, and default",
    )
    assert {i for i, e in content(store).items() if e[0] == "default"} == {0, 1, 2, 3, 4}


def test_unplugging_reads_no_row(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    (ref,) = (ref for ref in store.manifest().segments if ref.domain == "second")
    store.segment_path(ref).write_bytes(b"")  # so that reading it would fail
    with pytest.raises(StoreDamaged):
        store.segment(ref)
    store.commit(remove_domains=["second"], message="it goes unseen")
    assert {e[0] for e in content(store).values()} == {"default"}


def test_a_swap_for_new_segments_may_use_the_same_ids(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    path = write_toy_segment(store, "n", toy_entries(range(20, 30), seed=4))
    with pytest.raises(DuplicateEntry, match="20"):
        store.commit(add_segments=[path], domain="newer", message="beside the old ones")
    change = Change.of(add=[Addition(path=path, domain="newer")], swap={"second": "newer"})
    plan = store.plan(change)
    assert (plan.added, plan.removed, plan.entries_after) == (10, 5, 15)
    store.publish(plan, message="swap")
    now = {i: e[1] for i, e in content(store).items() if e[0] == "newer"}
    assert now == {i: f"text {i} of 4" for i in range(20, 30)}
    again = write_toy_segment(store, "n2", toy_entries(range(22, 25), seed=5))
    store.commit(add_segments=[again], domain="newer", swap={"newer": "newer"}, message="renewed")
    assert sum(e[0] == "newer" for e in content(store).values()) == 3


def test_documents_go_whole(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    store.commit(remove_doc_ids=[0, 7], message="documents 0 (0-2) and 7 (21-23)")
    assert sorted(content(store)) == [3, 4, 20, 24, 25]
    with pytest.raises(UnknownEntry, match=r"doc_ids.*: 0"):
        store.commit(remove_doc_ids=[0], message="again")


def test_replacing_takes_the_place_of_what_is_live(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    path = write_toy_segment(store, "r", toy_entries([3, 21, 22, 70], seed=8))
    plan = store.plan(Change.of(add=[path], replace=True))
    assert (plan.added, plan.removed, plan.replaced) == (4, 2, 2)
    store.publish(plan, message="upsert")
    found = content(store)
    assert all(found[i][:2] == ("default", f"text {i} of 8") for i in (3, 21, 22, 70))
    assert sorted(found) == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24, 25, 70]


def test_a_plan_writes_nothing_and_says_what_the_commit_does(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    path = write_toy_segment(store, "x", toy_entries([80, 81]))
    before, head = _files(store.path), store.head()
    change = Change.of(add=[path], remove_ids=[0, 20], swap={"second": "third"})
    plan = store.plan(change)
    assert _files(store.path) == before
    assert plan.parent == head
    table = {name: (d.before, d.after, d.added, d.removed) for name, d in plan.domains.items()}
    assert table == {"default": (5, 6, 2, 1), "second": (5, 0, 0, 5), "third": (0, 3, 3, 0)}
    assert plan.added_sample.tolist() == [80, 81]
    assert plan.removed_sample.tolist() == [0]
    version = store.publish(plan, message="m")
    assert store.manifest(version).entries == plan.entries_after == len(content(store)) == 9
    assert store.manifest().domains() == {"default": 6, "third": 3}
    written = sum(len(data) for name, data in _files(store.path).items() if name not in before)
    assert 0 < plan.bytes_to_write < written + len(before)
    with pytest.raises(StoreConflict):
        store.publish(plan, message="twice")


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ({}, ValueError, "nothing to commit"),
        ({"remove_domains": ["secnd"]}, UnknownDomain, "secnd.*default, second"),
        ({"plug": ["nothing"]}, UnknownDomain, "nothing.*default, second, third"),
        ({"plug": ["second"]}, DomainPlugged, "second"),
        ({"swap": {"third": "second"}}, UnknownDomain, "third"),
        ({"swap": {"default": "second"}}, DomainPlugged, "second"),
        ({"swap": {"default": "default"}}, ValueError, "itself"),
        ({"remove_domains": ["second", "second"]}, ValueError, "twice"),
        ({"remove_domains": "second"}, ValueError, "one text"),
        ({"remove_domains": ["a\nb"]}, ValueError, "line breaks"),
        ({"remove_ids": [0, 21]}, UnknownEntry, "21"),  # removed before
        ({"remove_ids": [-1]}, ValueError, "negative"),
        ({"remove_ids": [0.5]}, ValueError, "integers"),
        ({"remove_ids": [1 << 63]}, ValueError, "int64"),
        ({"remove_doc_ids": [99]}, UnknownEntry, "99"),
        ({"remove_ids": [20, 77], "remove_domains": ["second"]}, UnknownEntry, "1 ids.*77"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, wanted: dict[str, object], error: type[Exception], words: str
) -> None:
    store = prepared_store(tmp_path / "s")
    before = _files(store.path)
    with pytest.raises(error, match=words):
        store.commit(message="m", **wanted)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="message"):
        store.commit(remove_ids=[0], message=" ")
    assert _files(store.path) == before


def test_a_domain_does_not_come_back_over_ids_that_were_taken_since(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    store.commit(add_segments=[write_toy_segment(store, "t", toy_entries([41]))], message="taken")
    with pytest.raises(DuplicateEntry, match=r"third.*41"):
        store.plug("third")


def test_ids_of_unplugged_domains_are_not_given_again(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    assert store.next_id() == 43  # domain third had 40 to 42
    store.gc(keep_versions=1, min_age_s=0)
    assert store.next_id() == store.manifest().next_id == 43


def test_random_changes_against_a_dictionary(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    store = empty_store(tmp_path / "s")
    domains = ["a", "b", "c"]
    versions = [(store.head(), content(store))]
    for step in range(120):
        now = dict(versions[-1][1])
        live = sorted({entry[0] for entry in now.values()})
        kind = str(random.choice(["add", "ids", "docs", "drop", "plug", "swap", "back", "compact"]))
        if kind == "add":
            domain = str(random.choice(domains))
            ids = sorted(random.choice(60, 5, replace=False).tolist())
            entries = toy_entries(ids, seed=step)
            path = write_toy_segment(store, f"s{step}", entries)
            store.commit(add_segments=[path], domain=domain, replace=True, message="m")
            now |= {e.id: (domain, e.text, e.tokens) for e in entries}
        elif kind == "ids" and now:
            gone = random.choice(sorted(now), min(3, len(now)), replace=False).tolist()
            store.commit(remove_ids=gone, message="m")
            now = {i: e for i, e in now.items() if i not in gone}
        elif kind == "docs" and now:
            doc = int(random.choice(sorted(now))) // 3
            store.commit(remove_doc_ids=[doc], message="m")
            now = {i: e for i, e in now.items() if i // 3 != doc}
        elif kind == "drop" and live:
            store.unplug(live[0])
            now = {i: e for i, e in now.items() if e[0] != live[0]}
        elif kind in ("plug", "swap"):
            new = str(random.choice(domains))
            if kind == "swap" and live and live[0] != new:
                rest = {i: e for i, e in now.items() if e[0] != live[0]}
            else:
                kind, rest = "plug", now
            then = next((c for _, c in versions[::-1] if new in {e[0] for e in c.values()}), {})
            back = {i: e for i, e in then.items() if e[0] == new}
            refused = not back or new in {e[0] for e in rest.values()} or rest.keys() & back
            try:
                if kind == "swap":
                    store.swap(live[0], new)
                else:
                    store.plug(new)
            except MemoryServerError:
                assert refused
                continue
            assert not refused
            now = {**rest, **back}
        elif kind == "back":
            version, then = versions[int(random.integers(len(versions)))]
            if store.manifest(version).segments == store.manifest().segments:
                with pytest.raises(ValueError, match="nothing to roll back"):
                    store.rollback(version)
                continue
            store.rollback(version)
            now = then
        elif kind == "compact" and store.compact().version is None:
            continue
        if store.head() != versions[-1][0]:
            assert content(store) == now, kind
            versions.append((store.head(), now))
    assert len(versions) > 60
    for version, then in versions[::7]:
        assert content(store, version) == then
    for a, b in zip(versions[::5], versions[3::5], strict=False):
        difference = store.diff(a[0], b[0])
        both = a[1].keys() & b[1].keys()
        assert difference.added.tolist() == sorted(b[1].keys() - a[1].keys())
        assert difference.removed.tolist() == sorted(a[1].keys() - b[1].keys())
        assert difference.replaced.tolist() == sorted(i for i in both if a[1][i] != b[1][i])
    store.verify(all_versions=True)
