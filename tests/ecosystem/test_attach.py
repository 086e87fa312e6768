"""Plugging a memory in and out: attach, plain lookups, detach, and what is said without one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_server.store.store import Store
from tests.ecosystem.colours import FACTS, Found, encode, fact, make_memory, make_model

HEADS = ["", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
ASKED = fact("apple", "[MASK]")


def answer(model: Any, **options: Any) -> Tensor:
    found: Tensor = model(**encode(ASKED), **options)[0]
    return found.detach()


@pytest.mark.parametrize("head", HEADS)
def test_an_attached_memory_is_the_lookup_of_every_pass(head: str, store: Store) -> None:
    model = make_model(head)
    memory = make_memory(store, model)
    passed = answer(model, lookup=lambda queries_BQ: memory.search(queries_BQ, model.config.top_k))
    assert not model.has_memory
    model.attach(memory)
    assert model.has_memory
    assert torch.equal(answer(model), passed)
    assert torch.equal(answer(model), passed)
    assert model(**encode(ASKED)).retrievals[0].retrieved.ids.shape == (1, model.config.top_k)
    model.attach(memory, k=1)
    assert model(**encode(ASKED)).retrievals[0].retrieved.ids.shape == (1, 1)
    model.detach()
    assert not model.has_memory
    assert model(**encode(ASKED)).retrievals == ()


def test_a_plain_callable_is_a_memory(store: Store) -> None:
    model = make_model()
    asked: list[Tensor] = []
    entry = encode(fact("apple", "red"))["input_ids"]

    def lookup(queries_BQ: Tensor) -> Found:
        asked.append(queries_BQ)
        ids_BK = torch.zeros(len(queries_BQ), 1, dtype=torch.int64)
        return Found(ids=ids_BK, tokens=entry[ids_BK], doc_ids=ids_BK)

    model.attach(lookup)
    with_entry = answer(model)
    assert len(asked) == 1
    assert asked[0].dtype == torch.float32
    assert asked[0].shape == (1, model.config.key_size)
    assert not asked[0].requires_grad
    model.attach(None)
    assert not torch.equal(answer(model), with_entry)


def test_the_argument_wins_over_the_attached_memory(store: Store) -> None:
    model = make_model()
    memory = make_memory(store, model)
    model.attach(memory)
    one = answer(model, lookup=lambda queries_BQ: memory.search(queries_BQ, 1))
    model.attach(memory, k=1)
    assert torch.equal(answer(model), one)


def test_an_edit_of_the_store_is_seen_at_once(store: Store) -> None:
    model = make_model()
    memory = make_memory(store, model)
    model.attach(memory, k=len(FACTS))
    before = answer(model)
    version = store.commit(remove_ids=[0], message="apples have no colour")
    epoch = memory.stage(encoder_step=0, content_version=version)
    memory.wait_sealed(epoch, 30)
    assert torch.equal(answer(model), before)
    memory.activate(epoch)
    model.attach(memory, k=len(FACTS) - 1)
    assert not torch.equal(answer(model), before)
    assert 0 not in model(**encode(ASKED)).retrievals[0].retrieved.ids


def test_without_a_memory_it_says_so_once_and_on_purpose_never(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="model"):
        purposely = make_model()
        purposely.attach(None)
        plain = make_model(num_memory_layers=0)
        answer(purposely)
        answer(plain)
        assert not caplog.records
        model = make_model("SequenceClassification")
        answer(model)
        answer(model)
        assert [r.message for r in caplog.records] == [caplog.records[0].message]
        assert "no memory is attached" in caplog.records[0].message
        assert "model.attach(memory)" in caplog.records[0].message
        caplog.clear()
        memory = make_memory(store, model)
        model.attach(memory)
        answer(model)
        model.detach()
        answer(model)
        assert not caplog.records


def test_without_a_memory_it_is_the_encoder_with_the_term_left_out(store: Store) -> None:
    """What a memory without any entry for the query gives, too."""
    model = make_model()
    model.attach(None)
    nothing = torch.full((1, 2), -1)
    tokens = torch.zeros(1, 2, 4, dtype=torch.int64)
    empty = answer(model, lookup=lambda _: Found(ids=nothing, tokens=tokens, doc_ids=nothing))
    torch.testing.assert_close(answer(model), empty)


def test_a_memory_of_other_keys_is_refused(store: Store) -> None:
    memory = make_memory(store, make_model())
    other = make_model(key_size=16)
    with pytest.raises(ValueError, match=r"keys have width 32.*queries 16"):
        other.attach(memory)
    with pytest.raises(TypeError, match="str"):
        other.attach("memory")
    assert not other.has_memory
