"""The model equals an independent float64 implementation: values, retrieved ids, gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.reference.comparison import compare_everything, reference_pass
from tests.reference.worlds import FlatMemory, make_world

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
FROM_LAYERS = {"entry_encoder": "first_n", "entry_encoder_layers": 1}
POOLERS: dict[str, dict[str, Any]] = {
    f"{setting}-{pooler}": {setting: pooler}
    for setting in ("entry_pooler", "query_pooler")
    for pooler in ("mean", "max", "cls")
}
KEPT: dict[str, dict[str, Any]] = {
    f"fixed-{'-'.join(fixed)}-{pooling}": {f"fixed_{part}": True for part in fixed}
    | {"value_pooling": pooling}
    for fixed in (("keys",), ("values",), ("keys", "values"))
    for pooling in ("shared", "separate", "tokens")
}
HEADS: dict[str, dict[str, Any]] = {
    "classes": {
        "task": "sequence",
        "num_labels": 3,
        "problem_type": "single_label_classification",
    },
    "several-classes-each": {
        "task": "sequence",
        "num_labels": 3,
        "problem_type": "multi_label_classification",
    },
    "a-number": {"task": "sequence", "num_labels": 1, "problem_type": "regression"},
    "numbers": {"task": "sequence", "num_labels": 2, "problem_type": "regression"},
    "token-classes": {"task": "tokens", "num_labels": 3},
    "spans": {"task": "spans"},
}
LEGACY = {"legacy": True}
VARIANTS: dict[str, dict[str, Any]] = (
    COMBINATIONS
    | POOLERS
    | KEPT
    | HEADS
    | {
        "first-1": FROM_LAYERS,
        "first-2": {"entry_encoder": "first_n", "entry_encoder_layers": 2},
        "first-1-tokens": FROM_LAYERS | {"value_pooling": "tokens"},
        "first-1-separate-max": FROM_LAYERS | {"value_pooling": "separate", "entry_pooler": "max"},
        "first-1-legacy": FROM_LAYERS | LEGACY,
        "separate-mean": {"value_pooling": "separate", "entry_pooler": "mean"},
        "cls-both-tokens": {
            "entry_pooler": "cls",
            "query_pooler": "cls",
            "value_pooling": "tokens",
        },
        "no-memory-layer": {"num_memory_layers": 0},
        "two-memory-layers": {"num_memory_layers": 2},
        "two-memory-layers-tokens": {"num_memory_layers": 2, "value_pooling": "tokens"},
        "only-memory-layers": {"num_memory_layers": 3},
        "no-memory-ffn": {"memory_ffn_size": 0},
        "fewer-entries-than-k": {"entries": 2, "k": 4},
        "fewer-entries-than-k-tokens": {"entries": 2, "k": 4, "value_pooling": "tokens"},
        "fewer-entries-than-k-legacy": LEGACY | {"entries": 2, "k": 4},
        "fewer-entries-than-k-fixed": {
            "entries": 2,
            "k": 4,
            "fixed_keys": True,
            "fixed_values": True,
        },
        "an-empty-memory": {"entries": 1, "k": 2, "value_pooling": "tokens"},
        "k-of-one": {"k": 1},
        "padding-computed": {"unpad_inputs": False},
        "padding-computed-tokens": {"unpad_inputs": False, "value_pooling": "tokens"},
        "padding-computed-two-layers": {"unpad_inputs": False, "num_memory_layers": 2},
    }
    | {"spans-padding-computed": HEADS["spans"] | {"unpad_inputs": False}}
    | {"spans-legacy": HEADS["spans"] | LEGACY}
    | {f"{head}-plain": HEADS[head] | {"num_memory_layers": 0} for head in HEADS}
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_equals_the_reference_in_float64(variant: str, training: bool) -> None:
    compare_everything(make_world(**VARIANTS[variant]), EXACT, training=training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "variant",
    ["multi_head-shared-batch", "multi_head-tokens-layer", "fixed-keys-values-shared", "spans"],
)
def test_the_model_equals_the_reference_in_float32(variant: str, training: bool) -> None:
    world = make_world(**VARIANTS[variant])
    world.model.float()
    compare_everything(world, SINGLE, training=training)


def test_vectors_that_come_with_the_reply_are_left_alone_unless_they_are_asked_for() -> None:
    world = make_world()
    memory = world.memory
    with_vectors = FlatMemory(
        memory.keys_NQ, memory.tokens_NS, memory.ids_N, memory.k, torch.full((14, 1, 16), 1e3)
    )
    bare = SimpleNamespace(lookup=lambda q: replace(memory.lookup(q), keys=None, values=None))
    logits = [
        world.model.eval()(**world.inputs, lookup=m.lookup).logits for m in (with_vectors, bare)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem"),
    [
        (torch.tensor([0, 2, 1, 1]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), 3,
         "multi_label_classification"),
        (torch.tensor([0.5, -1.0, 3.0, 0.0]), 1, "regression"),
    ],
)  # fmt: skip
def test_the_kind_of_problem_is_read_off_the_labels(
    labels: torch.Tensor, num_labels: int, problem: str
) -> None:
    known = make_world(task="sequence", num_labels=num_labels, problem_type=problem)
    guessed = make_world(task="sequence", num_labels=num_labels, problem_type="regression")
    guessed.model.config.problem_type = None
    labels = labels.double() if labels.is_floating_point() else labels
    losses = [
        w.model.eval()(**w.inputs, labels=labels, lookup=w.memory.lookup).loss
        for w in (known, guessed)
    ]
    assert float(losses[0].detach()) > 0
    assert torch.equal(*losses)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_world_has_what_the_comparison_is_meant_to_cover(training: bool) -> None:
    world = make_world()
    wanted, grads = reference_pass(world, training=training)
    (ids,) = wanted.ids
    empty = int(world.memory.ids_N[0])
    assert not world.memory.tokens_NS[0].any()
    assert (ids == empty).any(), "an entry without tokens is retrieved"
    assert len(ids.unique()) < ids.numel(), "an entry is retrieved by several sequences"
    assert (world.inputs["attention_mask"] == 0).any(), "sequences are padded"
    assert (world.memory.tokens_NS[1:] == 0).any(), "entries are padded"
    assert len({tuple(row) for row in ids.tolist()}) > 1, "sequences retrieve different entries"
    for part in ("query_proj.weight", "entry_encoder.key_proj.weight", "beta"):
        assert any(float(g.abs().max()) > 1e-6 for n, g in grads.items() if n.endswith(part)), part
