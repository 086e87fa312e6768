"""Memories and answers that do not fit the model, and queries that cannot be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.worlds import Answer, World, make_world


def put(x: Tensor, value: float) -> Tensor:
    changed = x.clone()
    changed.view(-1)[-1] = value
    return changed


FIXED = {"fixed_keys": True, "fixed_values": True}
ANSWERS: dict[str, tuple[dict[str, Any], Callable[[Answer], dict[str, Any]], str]] = {
    "token-beyond-vocabulary": ({}, lambda a: {"tokens": put(a.tokens, 40)}, "token.*40.*0 to 39"),
    "token-negative": ({}, lambda a: {"tokens": put(a.tokens, -1)}, "token.*-1.*0 to 39"),
    "tokens-dtype": ({}, lambda a: {"tokens": a.tokens.float()}, "tokens.*float32.*int64"),
    "tokens-shape": ({}, lambda a: {"tokens": a.tokens[0]}, r"tokens.*\[3, 6\].*\[B,K,S\]"),
    "tokens-of-fewer": ({}, lambda a: {"tokens": a.tokens[:, :2]}, r"tokens.*\[4, 2, 6\]"),
    "tokens-of-other-queries": ({}, lambda a: {"tokens": a.tokens[:3]}, r"tokens.*\[3, 3, 6\].*4"),
    "tokens-missing": ({}, lambda a: {"tokens": None}, "tokens.*None"),
    "tokens-too-long": (
        {},
        lambda a: {"tokens": torch.ones(4, 3, 13, dtype=torch.int64)},
        "13 tokens.*12.*max_position_embeddings",
    ),
    "ids-shape": ({}, lambda a: {"ids": a.ids[0]}, r"ids.*\[3\].*\[B,K\]"),
    "ids-dtype": ({}, lambda a: {"ids": a.ids.float()}, "ids.*float32.*int64"),
    "ids-below-minus-one": ({}, lambda a: {"ids": put(a.ids, -2)}, "ids.*-2.*-1"),
    "doc-ids-shape": ({}, lambda a: {"doc_ids": a.doc_ids[:, :1]}, r"doc_ids.*\[4, 1\]"),
    "keys-missing": (FIXED, lambda a: {"keys": None}, "fixed_keys.*keys"),
    "values-missing": (FIXED, lambda a: {"values": None}, "fixed_values.*values"),
    "keys-shape": (FIXED, lambda a: {"keys": a.keys[..., :7]}, r"keys.*\[4, 3, 7\].*\[4, 3, 8\]"),
    "values-shape": (
        FIXED,
        lambda a: {"values": a.values[:, :, 0]},
        r"values.*\[4, 3, 16\].*\[4, 3, 1, 16\]",
    ),
    "values-of-tokens": (
        FIXED | {"value_pooling": "tokens"},
        lambda a: {"values": a.values[:, :, :1]},
        r"values.*\[4, 3, 1, 16\].*\[4, 3, 6, 16\]",
    ),
    "keys-dtype": (FIXED, lambda a: {"keys": a.keys.long()}, "keys.*int64.*float"),
    "keys-nan": (FIXED, lambda a: {"keys": put(a.keys, float("nan"))}, "keys.*NaN"),
    "values-infinite": (FIXED, lambda a: {"values": put(a.values, float("inf"))}, "values.*NaN"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_does_not_fit_is_refused(case: str) -> None:
    settings, change, message = ANSWERS[case]
    world = make_world(**settings)

    def lookup(queries_BQ: Tensor) -> Answer:
        found = world.memory.lookup(queries_BQ)
        return replace(found, **change(found))

    with pytest.raises((ValueError, TypeError), match=message):
        world.model(**world.inputs, lookup=lookup)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_names_its_layer_and_asks_nothing(
    value: float, norm: str
) -> None:
    world = make_world(num_memory_layers=2, query_norm=norm)
    model = world.model.train()
    with torch.no_grad():
        model.pluglm.layers[2].query_proj.bias[3] = value
    with pytest.raises(ValueError, match=r"layer 2.*NaN"):
        model(**world.inputs, lookup=world.memory.lookup)
    assert len(world.memory.calls) == 1, "the first memory layer's query was in order"


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a memory tells about itself."""

    entries: int = 14
    key_width: int = 8
    entry_tokens: int = 6
    tokenizer_fingerprint: str = "ours"
    pad_token_id: int = 0


class Described:
    """A memory that searches, and describes itself."""

    def __init__(self, world: World, **about: Any) -> None:
        self.world, self.about = world, Info(**about)
        self.asked: list[int] = []

    def info(self) -> Info:
        return self.about

    def search(self, queries_BQ: Tensor, k: int) -> Answer:
        self.asked.append(k)
        return self.world.memory.lookup(queries_BQ)


@pytest.mark.parametrize(
    ("about", "k", "message"),
    [
        ({"key_width": 9}, 3, "width 9.*8.*key_size"),
        ({"entry_tokens": 13}, 3, "13 tokens.*12.*max_position_embeddings"),
        ({"entries": 2}, 3, "k is 3.*2 entries"),
        ({"entries": 2}, None, "5.*2 entries.*top_k"),
        ({"tokenizer_fingerprint": "theirs"}, 3, "tokenizer.*theirs.*ours"),
        ({"pad_token_id": 1}, 3, "pad.*1.*0.*pad_token_id"),
        ({}, 0, "k is 0.*1"),
        ({}, -1, "k is -1.*1"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_when_it_is_attached(
    about: dict[str, Any], k: int | None, message: str
) -> None:
    world = make_world(tokenizer_fingerprint="ours")
    memory = Described(world, **about)
    with pytest.raises(ValueError, match=message):
        world.model.attach(memory, k)
    assert not world.model.has_memory
    assert not memory.asked


def test_a_memory_that_fits_is_asked_for_as_many_entries_as_were_said() -> None:
    world = make_world(tokenizer_fingerprint="ours", top_k=3)
    memory = Described(world)
    wanted = world.model.eval()(**world.inputs, lookup=world.memory.lookup).logits
    world.model.attach(memory)
    assert torch.equal(world.model(**world.inputs).logits, wanted)
    world.model.attach(memory, 2)
    world.model(**world.inputs)
    assert memory.asked == [3, 2]
    world.model.detach()
    assert not world.model.has_memory


@pytest.mark.parametrize("memory", ["memory.bin", 3, object()], ids=["path", "number", "object"])
def test_what_is_no_memory_is_refused_when_it_is_attached(memory: Any) -> None:
    with pytest.raises(TypeError, match=f"attach.*{type(memory).__name__}.*search"):
        make_world().model.attach(memory)


def test_a_k_beside_a_lookup_that_decides_itself_is_refused() -> None:
    world = make_world()
    with pytest.raises(ValueError, match=r"k is 3.*leave k out"):
        world.model.attach(world.memory.lookup, 3)


def test_a_model_without_memory_layers_takes_no_memory() -> None:
    world = make_world(num_memory_layers=0)
    with pytest.raises(ValueError, match=r"no memory layer.*num_memory_layers"):
        world.model.attach(world.memory.lookup)
