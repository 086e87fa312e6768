"""The model equals an independent float64 implementation: values, retrieved ids, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMForMaskedLM
from tests.reference.pluglm_reference import Reference, Result
from tests.reference.worlds import World, assert_close, capture, leaves, make_world

EXACT, SINGLE = 1e-9, 1e-5

COMBINATIONS: dict[str, dict[str, Any]] = {
    f"{attention}-{pooling}-{norm}": {
        "memory_attention": attention,
        "value_pooling": pooling,
        "query_norm": norm,
    }
    for attention, pooling, norm in itertools.product(
        ("multi_head", "single_head", "sentence_level"),
        ("shared", "separate", "tokens"),
        ("batch", "layer", "none"),
    )
    if (attention, pooling) != ("sentence_level", "tokens")
}
LEGACY = {"legacy": True, "value_pooling": "shared"}
VARIANTS: dict[str, dict[str, Any]] = COMBINATIONS | {
    "no-memory-layer": {"num_memory_layers": 0},
    "two-memory-layers": {"num_memory_layers": 2},
    "two-memory-layers-tokens": {"num_memory_layers": 2, "value_pooling": "tokens"},
    "only-memory-layers": {"num_memory_layers": 3},
    "no-memory-ffn": {"memory_ffn_size": 0},
    "legacy": LEGACY,
    "legacy-single-head": LEGACY | {"memory_attention": "single_head"},
    "legacy-two-memory-layers": LEGACY | {"num_memory_layers": 2, "memory_ffn_size": 0},
    "fewer-entries-than-k": {"entries": 2, "k": 4},
    "fewer-entries-than-k-tokens": {"entries": 2, "k": 4, "value_pooling": "tokens"},
    "fewer-entries-than-k-legacy": LEGACY | {"entries": 2, "k": 4},
    "an-empty-memory": {"entries": 1, "k": 2, "value_pooling": "tokens"},
    "k-of-one": {"k": 1},
}


def reference(world: World, *, training: bool) -> tuple[Result, dict[str, Tensor]]:
    """The reference's result and its gradients."""
    weights = leaves(world.model)
    result = Reference(weights, world.model.config.to_dict(), training=training).run(
        *world.inputs.values(), labels_BT=world.labels, memory=world.memory.stored, k=world.memory.k
    )
    assert result.loss is not None
    result.loss.backward()
    return result, {n: w.grad for n, w in weights.items() if w.grad is not None}


def compare_gradients(model: PlugLMForMaskedLM, wanted: dict[str, Tensor], relative: float) -> None:
    """Every parameter's gradient; where one side has none, the other's is zero."""
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, parameter in model.named_parameters():
        grad = wanted.get(name, torch.zeros_like(parameter))
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # Some gradients are zero but for rounding (a key's bias): measure these on the whole.
        assert_close(given, grad, relative, name, floor=largest * 1e-2)
    assert set(wanted) <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_equals_the_reference_in_float64(variant: str, training: bool) -> None:
    world = make_world(**VARIANTS[variant])
    model = world.model.train(training)
    wanted, grads = reference(world, training=training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    given, seen = capture(model, lambda: model(**world.inputs, lookup=world.memory.lookup))
    model.load_state_dict(before, strict=False)

    assert_close(given.logits, wanted.logits_BTV, EXACT, "logits")
    for retrieval, ids in zip(given.retrievals, wanted.ids, strict=True):
        assert torch.equal(retrieval.retrieved.ids, ids)
        found = (ids >= 0)[..., None].expand_as(retrieval.key_BKQ)
        key = wanted.values[f"layer{retrieval.layer}.key"]
        assert_close(retrieval.key_BKQ[found].view_as(key), key, EXACT, "key")
        query = wanted.values[f"layer{retrieval.layer}.query"]
        assert_close(retrieval.query_BQ, query, EXACT, "query")
    assert (
        len(seen)
        >= 1
        + model.config.num_hidden_layers
        + 6 * model.config.num_memory_layers
        - (model.config.memory_ffn_size == 0) * model.config.num_memory_layers
    )
    for name, value in seen.items():
        assert_close(value.expand_as(wanted.values[name]), wanted.values[name], EXACT, name)

    labelled = model(**world.inputs, labels=world.labels, lookup=world.memory.lookup)
    chosen = world.labels != model.config.ignored_label
    assert_close(labelled.logits, wanted.logits_BTV[chosen], EXACT, "logits of labelled positions")
    assert_close(labelled.loss, wanted.loss, EXACT, "loss")
    labelled.loss.backward()
    compare_gradients(model, grads, EXACT)
    for name, value in wanted.running.items():
        assert_close(model.state_dict()[name], value, EXACT, name)
    if not training:
        assert all(torch.equal(buffer, before[n]) for n, buffer in model.named_buffers())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "variant", ["multi_head-shared-batch", "multi_head-tokens-layer", "legacy"]
)
def test_the_model_equals_the_reference_in_float32(variant: str, training: bool) -> None:
    world = make_world(**VARIANTS[variant])
    world.model.float()
    world.model.train(training)
    wanted, grads = reference(world, training=training)
    given = world.model(**world.inputs, labels=world.labels, lookup=world.memory.lookup)
    given.loss.backward()
    chosen = world.labels != world.model.config.ignored_label
    assert torch.equal(given.retrievals[0].retrieved.ids, wanted.ids[0])
    assert_close(given.logits, wanted.logits_BTV[chosen], SINGLE, "logits")
    assert_close(given.loss, wanted.loss, SINGLE, "loss")
    compare_gradients(world.model, grads, SINGLE)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_world_has_what_the_comparison_is_meant_to_cover(training: bool) -> None:
    world = make_world()
    wanted, grads = reference(world, training=training)
    (ids,) = wanted.ids
    empty = int(world.memory.ids_N[0])
    assert not world.memory.tokens_NS[0].any()
    assert (ids == empty).any(), "an entry without tokens is retrieved"
    assert (world.inputs["attention_mask"] == 0).any(), "sequences are padded"
    assert (world.memory.tokens_NS[1:] == 0).any(), "entries are padded"
    assert len({tuple(row) for row in ids.tolist()}) > 1, "sequences retrieve different entries"
    for part in ("query_proj.weight", "entry_encoder.key_proj.weight", "beta"):
        assert any(float(g.abs().max()) > 1e-6 for n, g in grads.items() if n.endswith(part)), part
