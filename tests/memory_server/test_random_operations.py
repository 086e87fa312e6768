"""A memory under random commits, refreshes, rollbacks and searches, against a plain dictionary."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from memory_server.local import LocalMemory
from memory_server.store import Store
from tests.toy_memory import (
    ToyEntry,
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
    write_toy_segment,
)

OPERATIONS = 300


@pytest.mark.parametrize("seed", [0, 1])
def test_every_reply_is_what_its_epoch_holds(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    first = toy_entries(range(20), seed=seed)
    store = toy_store(tmp_path / "s", first)
    content: dict[str, dict[int, ToyEntry]] = {store.head(): {e.id: e for e in first}}
    weights = {1: toy_weights(1)}
    memory = LocalMemory(store, encoder=toy_factory, weights=weights[1], encoder_step=1)
    epochs = {memory.info().epoch: (store.head(), 1)}  # what each held epoch must be: content, step
    live = memory.info().epoch
    next_id = 1000

    def commit() -> None:
        nonlocal next_id
        now = dict(content[store.head()])
        removed = choose.sample(sorted(now), k=min(len(now), choose.randint(0, 4)))
        added = toy_entries(range(next_id, next_id + choose.randint(0, 3)), seed=seed)
        next_id += len(added)
        if removed and choose.random() < 0.5:  # an edit: the same id, another text
            again = toy_entries([removed[0]], seed=choose.randint(1, 10**6))
            added = [*added, *again]
        if not removed and not added:
            return
        paths = [write_toy_segment(store, f"c{next_id}", added)] if added else []
        version = store.commit(add_segments=paths, remove_ids=removed, message="random")
        for entry_id in removed:
            del now[entry_id]
        content[version] = now | {entry.id: entry for entry in added}

    def stage() -> None:
        nonlocal live
        newest_version, newest_step = epochs[max(epochs)]
        version = choose.choice([None, store.head(), choose.choice(list(content))])
        refreshed = choose.random() < 0.4
        step = choose.randint(2, 10**6) if refreshed else newest_step
        if refreshed:
            weights[step] = toy_weights(step)
        epoch = memory.stage(
            encoder_step=step,
            weights=weights[step] if refreshed else None,
            content_version=version,
        )
        memory.wait_sealed(epoch, 30)
        epochs[epoch] = (version or newest_version, step)
        if choose.random() < 0.8:
            memory.activate(epoch)
            live = epoch

    def release() -> None:
        idle = [epoch for epoch in epochs if epoch != live]
        if len(idle) > 1:
            epoch = choose.choice(idle)
            memory.release(epoch)
            del epochs[epoch]

    def search() -> None:
        asked = choose.choice([None, *epochs])
        version, step = epochs[live if asked is None else asked]
        entries = list(content[version].values())
        queries, k = toy_queries(2, choose.randint(0, 10**6)), choose.choice([1, 4, 40])
        documents = [choose.choice([-1, *(e.doc_id for e in entries)]) for _ in range(2)]
        reply = memory.search(queries, k, exclude_doc_ids=torch.tensor(documents), epoch=asked)
        assert (reply.epoch, reply.encoder_step) == (live if asked is None else asked, step)
        assert reply.ids.tolist() == expected_ids(entries, weights[step], queries, k, documents)
        for row, entry_id in zip(reply.tokens.flatten(0, 1), reply.ids.flatten(), strict=True):
            if entry_id >= 0:
                assert tuple(row.tolist()) == content[version][int(entry_id)].tokens

    def read() -> None:
        held = content[epochs[live][0]]
        some = choose.sample(sorted(held), k=min(3, len(held)))
        assert [e.text for e in memory.entries(some)] == [held[i].text for i in some]
        assert memory.info().entries == len(held)

    def reopen() -> None:
        nonlocal store
        store = Store.open(store.path)
        ids = [
            np.delete(store.segment(ref).ids, store.deleted_rows(ref))
            for ref in store.manifest().segments
        ]
        assert sorted(np.concatenate([[], *ids]).tolist()) == sorted(content[store.head()])

    for _ in range(OPERATIONS):
        step = choose.choices(
            [commit, stage, release, search, read, reopen], weights=[2, 2, 2, 6, 1, 1]
        )[0]
        step()
    memory.close()
