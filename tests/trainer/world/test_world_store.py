"""Each version of the store is one world, and facts are added, edited and removed by commits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memory_server.errors import DuplicateEntry, StoreError, UnknownEntry
from memory_server.store.store import Store
from trainer.world.facts import Fact, World
from trainer.world.store import (
    add_facts,
    build_world_store,
    edit_fact,
    find_fact,
    remove_facts,
)


def build(path: Path, worlds: int = 3) -> tuple[Store, list[str]]:
    versions = build_world_store(
        path, worlds=worlds, seed=5, size=20, tokenizer_fingerprint="words"
    )
    return Store.open(path), versions


def live(store: Store, version: str | None = None) -> dict[int, str]:
    found: dict[int, str] = {}
    for ref in store.manifest(version).segments:
        segment = store.segment(ref)
        for row in set(range(segment.rows)) - set(store.deleted_rows(ref).tolist()):
            found[int(segment.ids[row])] = segment.texts([row])[0]
    return found


def texts(facts: tuple[Fact, ...]) -> dict[int, str]:
    return {fact.id: fact.text for fact in facts}


def test_every_version_holds_exactly_its_world(tmp_path: Path) -> None:
    store, versions = build(tmp_path / "store")
    assert store.head() == versions[-1]
    for index, version in enumerate(versions):
        assert live(store, version) == texts(World(5, index, 20).facts)
        store.verify(version)
    assert "world 1" in store.manifest(versions[1]).message
    assert store.manifest(versions[2]).parent == versions[1]


def test_each_fact_is_a_document_of_its_own(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store")
    segment = store.segment(store.manifest().segments[0])
    np.testing.assert_array_equal(segment.ids, segment.doc_ids)


def test_an_edit_is_one_commit_and_the_version_before_stays_as_it_was(tmp_path: Path) -> None:
    store, versions = build(tmp_path / "store")
    facts = World(5, 2, 20).facts
    version, edited = edit_fact(store, facts[3].id, "tea", "tea instead")
    assert store.manifest(version).parent == versions[-1]
    wanted = texts(facts)
    del wanted[facts[3].id]
    assert live(store) == wanted | {edited.id: edited.text}
    assert edited.words == (*facts[3].words[:3], "tea")
    assert live(store, versions[-1]) == texts(facts)
    # The document is the old one, also after another edit.
    _, again = edit_fact(store, edited.id, "salt", "salt instead")
    assert find_fact(store, again.id) == (again, facts[3].id)


def test_facts_are_removed_and_put_back_under_their_own_ids(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store")
    facts = World(5, 2, 20).facts
    remove_facts(store, [fact.id for fact in facts[:4]], "less")
    assert live(store) == texts(facts[4:])
    add_facts(store, facts[:4], "back")
    assert live(store) == texts(facts)
    with pytest.raises(DuplicateEntry):
        add_facts(store, facts[:1], "twice")


def test_changes_of_facts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    store, versions = build(tmp_path / "store")
    old = World(5, 0, 20).facts[0].id
    with pytest.raises(UnknownEntry, match="holds no entry 0"):
        edit_fact(store, old, "tea", "of a world that is gone")
    with pytest.raises(UnknownEntry):
        remove_facts(store, [old], "of a world that is gone")
    with pytest.raises(ValueError, match="no thing of the synthetic world"):
        edit_fact(store, World(5, 2, 20).facts[0].id, "zebra", "no such thing")
    assert store.head() == versions[-1]
    with pytest.raises(StoreError, match="holds a store already"):
        build(tmp_path / "store")
    with pytest.raises(ValueError, match="worlds=0"):
        build(tmp_path / "other", worlds=0)
