"""The worlds as content versions of one store, and the changes that a person makes to facts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from memory_server.errors import UnknownEntry
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from trainer.world.facts import SOURCE, Fact, World
from trainer.world.tokenizer import (
    ENTRY_TOKENS,
    PAD,
    VOCABULARY,
    entry_tokens,
)


def build_world_store(
    path: Path, *, worlds: int, seed: int, size: int, tokenizer_fingerprint: str
) -> list[str]:
    """Make a store whose content versions are the worlds 0, 1, 2, ..., one after the other.

    Each commit plugs the next world and unplugs the one before, so that a version holds exactly
    one world; a segment that is gone from the newest version stays on disk for the older ones.

    Args:
        path: where; must hold no store yet.
        worlds: how many, at least 1.
        seed: of the worlds.
        size: facts per world.
        tokenizer_fingerprint: of the world's tokenizer.

    Returns:
        The content version of each world.

    Raises:
        ValueError: fewer than 1 world. memory_server.errors.StoreError: there is a store already.
    """
    if worlds < 1:
        raise ValueError(f"worlds={worlds}: must be at least 1")
    store = Store.create(
        path,
        tokenizer_fingerprint=tokenizer_fingerprint,
        entry_tokens=ENTRY_TOKENS,
        vocab_size=len(VOCABULARY),
        pad_token_id=PAD,
    )
    versions: list[str] = []
    gone: list[int] = []
    for index in range(worlds):
        facts = World(seed, index, size).facts
        segment = write_facts(store, facts)
        message = f"world {index}: {len(facts)} facts drawn afresh"
        versions.append(store.commit(add_segments=[segment], remove_ids=gone, message=message))
        gone = [fact.id for fact in facts]
    return versions


def write_facts(store: Store, facts: Sequence[Fact], *, doc_ids: Sequence[int] = ()) -> Path:
    """Write facts as a segment that the store's next commit can adopt.

    Args:
        store: whose tokenizer is the world's.
        facts: with ids that are free.
        doc_ids: their documents; by default every fact is a document of its own.
    """
    path = store.incoming / f"facts-{uuid.uuid4().hex}.arrow"
    ids = [fact.id for fact in facts]
    write_segment(
        path,
        ids=ids,
        doc_ids=list(doc_ids) or ids,
        tokens_NS=entry_tokens(facts),
        texts=[fact.text for fact in facts],
        titles=[fact.giver for fact in facts],
        sources=[SOURCE] * len(facts),
        meta=store.meta,
    )
    return path


def add_facts(store: Store, facts: Sequence[Fact], message: str) -> str:
    """Commit further facts; returns the new content version.

    Raises:
        memory_server.errors.DuplicateEntry: an id is live already.
    """
    return store.commit(add_segments=[write_facts(store, facts)], message=message)


def remove_facts(store: Store, ids: Sequence[int], message: str) -> str:
    """Commit the removal of facts; returns the new content version.

    Raises:
        memory_server.errors.UnknownEntry: an id is not live.
    """
    return store.commit(remove_ids=ids, message=message)


def edit_fact(store: Store, fact_id: int, thing: str, message: str) -> tuple[str, Fact]:
    """Commit that a fact is about another thing: one commit removes the old entry and adds the new.

    The new entry has an id of its own and stays in the old one's document.

    Returns:
        (the new content version, the fact as it is now).

    Raises:
        memory_server.errors.UnknownEntry: the fact is not live in the head.
        ValueError: there is no such thing.
    """
    version, (fact,) = edit_facts(store, {fact_id: thing}, message)
    return version, fact


def edit_facts(store: Store, things: Mapping[int, str], message: str) -> tuple[str, list[Fact]]:
    """The same of several facts, by their ids, in one commit.

    Returns:
        (the new content version, the facts as they are now, in the order that they were given in).

    Raises:
        As `edit_fact`.
    """
    found = [find_fact(store, fact_id) for fact_id in things]
    first = max(ref.max_id for ref in store.manifest().segments) + 1
    facts = [
        old.with_thing(thing, id=first + place)
        for place, ((old, _), thing) in enumerate(zip(found, things.values(), strict=True))
    ]
    segment = write_facts(store, facts, doc_ids=[doc_id for _, doc_id in found])
    version = store.commit(add_segments=[segment], remove_ids=list(things), message=message)
    return version, facts


def find_fact(store: Store, fact_id: int) -> tuple[Fact, int]:
    """Read a live fact of the head.

    Returns:
        (the fact, its document).

    Raises:
        memory_server.errors.UnknownEntry: no live entry has this id.
    """
    for ref in store.manifest().segments:
        segment = store.segment(ref)
        rows = np.setdiff1d(np.flatnonzero(segment.ids == fact_id), store.deleted_rows(ref))
        if len(rows):
            row = int(rows[0])
            giver, verb, receiver, thing = segment.texts([row])[0].split()
            fact = Fact(id=fact_id, giver=giver, verb=verb, receiver=receiver, thing=thing)
            return fact, int(segment.doc_ids[row])
    raise UnknownEntry(
        f"the head of {store.path} holds no entry {fact_id}; give the id of a live fact"
    )
