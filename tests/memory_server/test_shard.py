"""Shards without Ray: one answers as many do, unchanged keys are kept, readers are safe."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memory_server.api import KeyEncoder, Retrieved
from memory_server.errors import MemoryClosed, ShardRestoring
from memory_server.keys.key_codes import KeyCodes
from memory_server.replies import merge_replies
from memory_server.shard import epoch_builder
from memory_server.shard.content import LARGE_ROWS
from memory_server.shard.epochs import EpochPlan, Receipt
from memory_server.shard.shard import Shard
from memory_server.store.store import Store
from tests.toy_memory import (
    KEY_WIDTH,
    ToyEncoder,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
    write_toy_segment,
)


def plan(epoch: int, version: str, *, weights_id: int = 1, step: int = 0) -> EpochPlan:
    return EpochPlan(epoch=epoch, content_version=version, encoder_step=step, weights_id=weights_id)


def seal(shard: Shard, what: EpochPlan, weights: Mapping[str, Tensor] | None = None) -> Receipt:
    shard.stage(what, lambda: toy_weights(1) if weights is None else weights)
    while (status := shard.status(what.epoch)).state == "encoding":
        threading.Event().wait(0.002)
    assert status.receipt is not None, status.error
    shard.activate(what.epoch)
    return status.receipt


def answer(store: Store, shards: int, queries: Tensor, k: int, exclude: Tensor) -> Retrieved:
    replies = []
    for number in range(shards):
        shard = Shard(store.path, shards=shards, shard=number, encoder=toy_factory)
        seal(shard, plan(1, store.head()))
        replies.append(shard.search(queries, k, exclude))
        shard.close()
    return merge_replies(replies, k, device=queries.device)


@pytest.fixture(scope="module")
def edited_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = toy_store(
        tmp_path_factory.mktemp("shards") / "s",
        toy_entries(range(40)),
        toy_entries([900, 3000, 77]),
    )
    store.commit(remove_ids=[*range(0, 40, 7), 3000], message="fewer")
    return store


@given(shards=st.integers(2, 16), k=st.integers(1, 45), seed=st.integers(0, 99))
def test_many_shards_answer_exactly_as_one(
    edited_store: Store, shards: int, k: int, seed: int
) -> None:
    queries = toy_queries(3, seed)
    exclude = torch.tensor([seed % 14, -1, 300])
    one = answer(edited_store, 1, queries, k, exclude)
    many = answer(edited_store, shards, queries, k, exclude)
    for field in ("ids", "scores", "tokens", "doc_ids"):
        assert torch.equal(getattr(one, field), getattr(many, field)), field


def test_real_numbers_too_give_the_same_bits_on_any_number_of_shards(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(300)))
    torch.manual_seed(0)
    table = {"table": torch.randn(50, KEY_WIDTH)}
    queries = torch.randn(20, KEY_WIDTH)
    answers = []
    for shards in (1, 3, 16):
        replies = []
        for number in range(shards):
            shard = Shard(store.path, shards=shards, shard=number, encoder=toy_factory)
            seal(shard, plan(1, store.head()), table)
            replies.append(shard.search(queries, 9))
        answers.append(merge_replies(replies, 9, device=queries.device))
    for other in answers[1:]:
        assert torch.equal(answers[0].ids, other.ids)
        assert torch.equal(answers[0].scores, other.scores)


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


def test_only_what_changed_is_encoded(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(100)))
    first = store.head()
    counting = Counting()
    shard = Shard(store.path, shards=2, shard=0, encoder=counting)
    original = seal(shard, plan(1, first))
    assert (original.encoded_rows, counting.entries) == (50, 50)
    removed = store.commit(remove_ids=[3, 4], message="fewer")
    assert seal(shard, plan(2, removed)).encoded_rows == 0
    more = store.commit(
        add_segments=[write_toy_segment(store, "x", toy_entries(range(200, 210)))], message="more"
    )
    assert seal(shard, plan(3, more)).encoded_rows == 5
    assert counting.entries == 55
    shard.release(1)
    # Back to the first version: the two entries that were removed have keys nowhere any more...
    shard.release(2)
    back = seal(shard, plan(4, first))
    assert back.encoded_rows == 2
    # ...and the keys are what they were.
    assert back.key_checksum == original.key_checksum
    assert seal(shard, plan(5, first, weights_id=2, step=9)).encoded_rows == 50
    assert shard.status(5).receipt.encoder_step == 9  # type: ignore[union-attr]
    shard.close()


def test_a_search_finishes_on_an_epoch_that_is_released_meanwhile(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(60)))
    shard = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
    seal(shard, plan(1, store.head()))
    stop, epochs, failures = threading.Event(), set(), []

    def search() -> None:
        while not stop.is_set():
            try:
                reply = shard.search(toy_queries(4), 3)
                expected = answers[reply.epoch % 2]
                assert reply.ids.tolist() == expected
                epochs.add(reply.epoch)
            except Exception as error:
                failures.append(error)
                return

    answers = {}
    for parity in (1, 0):
        other = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
        seal(other, plan(1, store.head()), toy_weights(parity))
        answers[parity] = other.search(toy_queries(4), 3).ids.tolist()
        other.close()
    readers = [threading.Thread(target=search) for _ in range(2)]
    for reader in readers:
        reader.start()
    for epoch in range(2, 30):
        seal(shard, plan(epoch, store.head(), weights_id=epoch), toy_weights(epoch % 2))
        shard.release(epoch - 1)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(epochs) > 2
    shard.close()


def test_a_shard_that_restores_lets_searches_wait(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(60)))
    shard = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
    slow = {**toy_weights(1), "slow": torch.tensor(0.3)}
    shard.stage(plan(1, store.head()), lambda: slow, restoring=True)
    shard.activate(1)
    with pytest.raises(ShardRestoring, match="building epoch 1 again"):
        shard.search(toy_queries(1), 1, wait_s=0.0)
    assert shard.search(toy_queries(1), 1, wait_s=30.0).epoch == 1
    shard.close()
    with pytest.raises(MemoryClosed):
        shard.search(toy_queries(1), 1)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda tokens: tokens.sum(1), "floating point"),
        (lambda tokens: torch.zeros(3, KEY_WIDTH), "key width"),
        (lambda tokens: torch.full((len(tokens), 2), float("inf")), "NaN or infinity for entry 0"),
        (lambda tokens: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_bad_encoder_fails_the_epoch_with_its_reason(
    tmp_path: Path, encoder: KeyEncoder, words: str
) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(5)))
    shard = Shard(store.path, shards=1, shard=0, encoder=lambda _: encoder)
    shard.stage(plan(1, store.head()), dict)
    while (status := shard.status(1)).state == "encoding":
        threading.Event().wait(0.002)
    assert status.state == "failed"
    assert words in str(status.error)
    shard.close()


def test_what_an_epoch_has_made_already_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, blocks = 2 * LARGE_ROWS, 8
    parts = (toy_entries(range(i * rows, (i + 1) * rows)) for i in range(blocks))
    store = toy_store(tmp_path / "s", *parts)
    bytes_per_row = 4 * KEY_WIDTH + 8
    free = rows * blocks * bytes_per_row
    make_room = KeyCodes.empty

    def less_is_free(n: int, *more: Any) -> KeyCodes:
        nonlocal free
        free -= n * bytes_per_row
        return make_room(n, *more)

    monkeypatch.setattr(KeyCodes, "empty", less_is_free)
    monkeypatch.setattr(epoch_builder, "free_bytes", lambda device: free)
    shard = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
    assert seal(shard, plan(1, store.head())).rows == rows * blocks
    assert free == 0
    shard.close()
    free = rows * blocks * bytes_per_row - 1
    shard = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
    with pytest.raises(AssertionError, match=r"needs .* beside the live epoch"):
        seal(shard, plan(1, store.head()))
    assert free == rows * blocks * bytes_per_row - 1, "it was refused before room was made"
    shard.close()
