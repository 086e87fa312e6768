"""Large parts of a shard's content share their keys between epochs; nothing is encoded twice."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memory_server.api import KeyEncoder
from memory_server.index.base import IndexSettings
from memory_server.shard.content import LARGE_ROWS, ShardContent, cut_along
from memory_server.shard.epochs import EpochPlan, Receipt
from memory_server.shard.shard import Shard
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from tests.toy_memory import ENTRY_TOKENS, VOCAB, ToyEncoder, empty_store, toy_queries, toy_weights

ROWS = 16_885


def add_rows(store: Store, name: str, first_id: int, rows: int, *, domain: str = "big") -> None:
    path = store.incoming / f"{name}.arrow"
    random = np.random.default_rng(first_id)
    write_segment(
        path,
        ids=np.arange(first_id, first_id + rows),
        doc_ids=np.arange(first_id, first_id + rows) // 3,
        tokens_NS=random.integers(1, VOCAB, (rows, ENTRY_TOKENS)),
        texts=[""] * rows,
        titles=[""] * rows,
        sources=[""] * rows,
        meta=store.meta,
    )
    store.commit(add_segments=[path], message=name, domain=domain)


class Counting:
    """A factory that counts the entries encoded."""

    def __init__(self) -> None:
        self.entries = 0

    def __call__(self, weights: Mapping[str, Tensor]) -> KeyEncoder:
        encoder = ToyEncoder(weights)

        def encode(tokens: Tensor) -> Tensor:
            self.entries += len(tokens)
            return encoder(tokens)

        return encode


def seal(shard: Shard, epoch: int, version: str, *, weights_id: int = 1) -> Receipt:
    plan = EpochPlan(epoch=epoch, content_version=version, encoder_step=0, weights_id=weights_id)
    shard.stage(plan, lambda: toy_weights(weights_id))
    while (status := shard.status(epoch)).state == "encoding":
        pass
    assert status.receipt is not None, status.error
    shard.activate(epoch)
    return status.receipt


def exact(store: Store, version: str, shards: int, shard: int, queries: Tensor, k: int) -> list:
    """The shard's answer by a full sort over a content that was loaded afresh."""
    content = ShardContent(store, version, shards=shards, shard=shard)
    rows = np.flatnonzero(content.is_live)
    keys = ToyEncoder(toy_weights(1))(torch.from_numpy(content.tokens(rows).astype(np.int64)))
    scores = (queries @ keys.T).tolist()
    ids = content.ids[rows].tolist()
    return [
        [i for _, i in sorted((-s, i) for s, i in zip(line, ids, strict=True))[:k]]
        for line in scores
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = empty_store(tmp_path / "s")
    add_rows(store, "first", 0, ROWS, domain="first")
    add_rows(store, "second", 100_000, ROWS, domain="second")
    return store


def test_edits_encode_and_copy_only_what_is_new(store: Store) -> None:
    counting = Counting()
    shard = Shard(store.path, shards=1, shard=0, encoder=counting)
    seal(shard, 1, store.head())
    assert counting.entries == 2 * ROWS
    add_rows(store, "more", 200_000, 40)
    added = seal(shard, 2, store.head())
    assert (added.encoded_rows, counting.entries) == (40, 2 * ROWS + 40)
    store.commit(remove_ids=[5, 100_007, 200_003], message="fewer")
    assert seal(shard, 3, store.head()).encoded_rows == 0
    # The large blocks are the same objects in all epochs: their bytes count once.
    blocks = [shard._epochs[e].sealed.keys.views[0].block for e in (1, 2, 3)]  # type: ignore[union-attr]
    assert blocks[0] is blocks[1] is blocks[2]
    queries = toy_queries(6)
    for epoch, version in ((3, "HEAD"), (2, "HEAD~1")):
        found = shard.search(queries, 9, epoch=epoch).ids.tolist()
        assert found == exact(store, store.manifest(version).version, 1, 0, queries, 9)
    shard.close()


def test_rows_that_are_dealt_anew_do_not_cost_the_blocks_their_use(store: Store) -> None:
    counting = Counting()
    shard = Shard(store.path, shards=2, shard=0, encoder=counting)
    seal(shard, 1, store.head())
    before = counting.entries
    ids = store.segment(store.manifest().segments[0]).ids
    store.commit(remove_ids=ids, message="the first domain goes: an odd number of rows")
    receipt = seal(shard, 2, store.head())
    assert counting.entries - before == receipt.encoded_rows <= 1
    queries = toy_queries(4)
    assert shard.search(queries, 7).ids.tolist() == exact(store, store.head(), 2, 0, queries, 7)
    shard.close()


def test_removed_rows_of_a_large_part_come_back_without_encoding(store: Store) -> None:
    counting = Counting()
    full = store.head()
    store.commit(remove_ids=range(0, 3000), message="fewer")
    shard = Shard(store.path, shards=1, shard=0, encoder=counting)
    seal(shard, 1, store.head())
    before = counting.entries
    assert seal(shard, 2, full).encoded_rows == 0
    assert counting.entries == before
    queries = toy_queries(4)
    assert shard.search(queries, 7).ids.tolist() == exact(store, full, 1, 0, queries, 7)
    shard.close()


def test_equal_contents_have_equal_receipts_and_other_weights_others(store: Store) -> None:
    receipts = []
    for weights in (1, 1, 2):
        shard = Shard(store.path, shards=2, shard=1, encoder=Counting())
        receipts.append(seal(shard, 1, store.head(), weights_id=weights))
        shard.close()
    one, same, other = receipts
    assert (one.layout, one.key_checksum) == (same.layout, same.key_checksum)
    assert one.layout == other.layout
    assert one.key_checksum != other.key_checksum


def test_coded_keys_are_scored_by_their_epochs_own_encoder(store: Store) -> None:
    """A release in the middle of a search takes the epoch away, not what the search needs."""
    shard = Shard(
        store.path, shards=1, shard=0, encoder=Counting(), index=IndexSettings(key_dtype="int8")
    )
    seal(shard, 1, store.head())
    index = shard._epochs[1].sealed.index  # type: ignore[union-attr]
    before = index.search(toy_queries(3), 4, None)
    seal(shard, 2, store.head(), weights_id=2)
    shard.release(1)
    after = index.search(toy_queries(3), 4, None)
    assert torch.equal(before.rows, after.rows)
    shard.close()


@given(
    start=st.integers(0, 3 * LARGE_ROWS),
    length=st.integers(0, 3 * LARGE_ROWS),
    held=st.lists(st.tuples(st.integers(0, 3 * LARGE_ROWS), st.integers(0, 3 * LARGE_ROWS))),
)
def test_a_span_is_cut_without_losing_a_row(
    start: int, length: int, held: list[tuple[int, int]]
) -> None:
    stop = start + length
    pieces = cut_along(start, stop, held)
    assert [row for a, b in pieces for row in (a, b)] == sorted(
        row for a, b in pieces for row in (a, b)
    )
    if length:
        assert (pieces[0][0], pieces[-1][1]) == (start, stop)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
        best = max((min(stop, b) - max(start, a) for a, b in held), default=0)
        if best >= LARGE_ROWS:
            assert any(a <= low and high <= b for low, high in pieces for a, b in held)
