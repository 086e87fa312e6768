"""Every variant that can be configured, trained for some steps, keeps the reference's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.pairwise import pairs_of, pairwise, possible_pairs
from tests.reference.worlds import World, assert_close, leaves, make_world

STEPS, LR = 3, 0.05

SETTINGS: dict[str, tuple[Any, ...]] = {
    "memory_attention": ("multi_head", "single_head", "sentence_level"),
    "value_pooling": ("shared", "separate", "tokens"),
    "query_norm": ("batch", "layer", "none"),
    "entry_pooler": ("attentive", "mean", "max", "cls"),
    "query_pooler": ("attentive", "mean", "max", "cls"),
    "entry_encoder_layers": (0, 1, 2),
    "fixed_keys": (False, True),
    "fixed_values": (False, True),
    "num_memory_layers": (1, 2),
    "memory_ffn_size": (12, 0),
    "legacy": (False, True),
    "unpad_inputs": (True, False),
    "head": ("masked_lm", "classes", "several", "number", "tokens", "spans"),
}
HEADS: dict[str, dict[str, Any]] = {
    "masked_lm": {},
    "classes": {
        "task": "sequence",
        "num_labels": 3,
        "problem_type": "single_label_classification",
    },
    "several": {"task": "sequence", "num_labels": 3, "problem_type": "multi_label_classification"},
    "number": {"task": "sequence", "num_labels": 1, "problem_type": "regression"},
    "tokens": {"task": "tokens", "num_labels": 3},
    "spans": {"task": "spans"},
}
FORBIDDEN = {
    frozenset(pair.items())
    for pair in (
        {"memory_attention": "sentence_level", "value_pooling": "tokens"},
        {"legacy": True, "value_pooling": "separate"},
        {"legacy": True, "value_pooling": "tokens"},
        # Of three layers the first two can only encode entries if one alone reads the memory.
        {"entry_encoder_layers": 2, "num_memory_layers": 2},
    )
}
CHOICES = pairwise(SETTINGS, FORBIDDEN)


def world_of(choice: dict[str, Any]) -> World:
    settings = {name: value for name, value in choice.items() if name != "head"}
    encoder = "first_n" if choice["entry_encoder_layers"] else "word_embedding"
    return make_world(entry_encoder=encoder, **settings, **HEADS[choice["head"]])


def reference_steps(world: World) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the weights after plain gradient descent on the reference alone."""
    state, losses = leaves(world.model), []
    for _ in range(STEPS):
        result = world.reference(state, training=True)
        assert result.loss is not None
        losses.append(float(result.loss.detach()))
        trained = {n: w for n, w in state.items() if w.requires_grad}
        grads = torch.autograd.grad(
            result.loss, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        for (name, weight), grad in zip(trained.items(), grads, strict=True):
            state[name] = (weight.detach() - LR * grad).requires_grad_()
        state |= result.running
    return losses, state


def model_steps(world: World) -> list[float]:
    """The same on the model, with torch's own optimizer; the memory's keys stay as they were."""
    model = world.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for _ in range(STEPS):
        loss = model(**world.inputs, **world.targets, lookup=world.memory.lookup).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "choice", CHOICES, ids=["-".join(str(v) for v in c.values()) for c in CHOICES]
)
def test_trained_for_some_steps_it_has_the_references_weights(choice: dict[str, Any]) -> None:
    world = world_of(choice)
    started = {name: p.detach().clone() for name, p in world.model.named_parameters()}
    wanted_losses, wanted = reference_steps(world)
    assert model_steps(world) == pytest.approx(wanted_losses, rel=1e-9)
    for name, value in world.model.named_parameters():
        moved = wanted[name].detach() - started[name]
        # Measured on how far the steps went, not on how large the weights are.
        assert_close(value - started[name], moved, 1e-7, name, floor=1e-4)
    for name, value in world.model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert_close(value, wanted[name], 1e-9, name)


def test_every_two_settings_that_can_be_together_are_trained_together() -> None:
    together = set().union(*(pairs_of(choice) for choice in CHOICES))
    possible = set(possible_pairs(SETTINGS, FORBIDDEN))
    assert together == possible
    # Counted by hand: e.g. a head meets 32 values of the twelve other settings.
    assert sum(("head", "spans") in pair for pair in possible) == 32
    assert not any(frozenset(pair) in together for pair in FORBIDDEN)
