"""Where an epsilon decides, and where a score is far from zero, the whole model is still exact.

Each case first shows that the numbers are in the region where a wrong epsilon is seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.comparison import capture, compare_everything
from tests.reference.worlds import World, assert_close, leaves, make_world

EXACT = 1e-9
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
both_layouts = pytest.mark.parametrize("legacy", [False, True], ids=["default", "published"])


def shift_scores(world: World, by: float, stretch: float = 1.0) -> None:
    """Move the scores of the poolers of entries and of queries."""
    with torch.no_grad():
        for name, parameter in world.model.named_parameters():
            if name.endswith("att_fc2.bias"):
                parameter.add_(by)
            elif name.endswith("att_fc2.weight"):
                parameter.mul_(stretch)


def scores_of(world: World) -> Tensor:
    """All scores that the poolers give in one pass, of tokens and padding alike."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().flatten()))
        for name, module in world.model.named_modules()
        if name.endswith("att_fc2")
    ]
    world.model.eval()(**world.inputs, lookup=world.memory.lookup)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


def logits(world: World) -> Tensor:
    given: Tensor = world.model.eval()(**world.inputs, lookup=world.memory.lookup).logits
    return given.detach()


@both_modes
@pytest.mark.parametrize(
    "settings",
    [{"legacy": True}, *({"value_pooling": p} for p in ("shared", "separate", "tokens"))],
    ids=str,
)
def test_the_poolers_epsilon_where_the_weights_are_as_small_as_it(
    settings: dict[str, Any], training: bool
) -> None:
    settings = settings | {"query_norm": "none"}
    world, without = make_world(**settings), make_world(**settings)
    shift_scores(world, -18.4)  # exp(-18.4) is about 1e-8
    shift_scores(without, 5.0)  # where 1e-8 counts for nothing
    assert float((logits(world) - logits(without)).abs().max()) > 1e-2
    compare_everything(world, EXACT, training=training)


@pytest.mark.parametrize("shift", [-60.0, -200.0, -800.0])
def test_scores_so_low_that_nothing_is_left(shift: float) -> None:
    """exp(-60)/1e-8 is 1e-18, exp(-800) is no number at all; the pooled vector fades to zero."""
    world = make_world(query_norm="none")
    shift_scores(world, shift)
    _, seen = capture(
        world.model, lambda: world.model.eval()(**world.inputs, lookup=world.memory.lookup)
    )
    assert float(seen["layer2.pooled"].detach().abs().max()) < 1e-15
    compare_everything(world, EXACT, training=False)


@both_modes
@pytest.mark.parametrize("pooling", ["shared", "tokens"])
def test_scores_of_a_hundred_and_of_minus_sixty_are_finite_and_right(
    pooling: str, training: bool
) -> None:
    world = make_world(value_pooling=pooling)
    for _ in range(8):  # what is retrieved changes with the poolers, and the scores with it
        scores = scores_of(world)
        stretch = 160.0 / float(scores.max() - scores.min())
        shift_scores(world, 0.0, stretch)
        scores = scores_of(world)
        shift_scores(world, 100.0 - float(scores.max()))
    scores = scores_of(world)
    assert float(scores.max()) == pytest.approx(100.0, abs=1.0)
    assert float(scores.min()) < -50.0
    # The reference adds no exponential up: it takes the logarithm of the sum.
    compare_everything(world, EXACT, training=training)
    exact = logits(world)
    world.model.float()
    rounded = world.model.eval()(**world.inputs, **world.targets, lookup=world.memory.lookup)
    rounded.loss.backward()
    assert_close(logits(world), exact, 1e-3, "logits in float32")
    finite = [bool(p.grad.isfinite().all()) for p in world.model.parameters() if p.grad is not None]
    assert finite
    assert all(finite)


@both_modes
@both_layouts
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_query_norms_epsilon_where_the_variance_is_as_small_as_it(
    norm: str, legacy: bool, training: bool
) -> None:
    world = make_world(query_norm=norm, legacy=legacy)
    layer = world.model.pluglm.layers[2]
    with torch.no_grad():
        layer.query_proj.weight.mul_(2e-3)
        layer.query_proj.bias.mul_(2e-3)
        for name, buffer in layer.query_norm.named_buffers():
            if name == "running_var":
                buffer.mul_(1e-5)
            elif name == "running_mean":
                buffer.mul_(2e-3)
    wanted = compare_everything(world, EXACT, training=training)
    raw_BQ = wanted.values["layer2.query_pre_batchnorm"]
    variance = raw_BQ.var(0 if norm == "batch" else 1, correction=0)
    assert bool((variance < 1e-4).all())
    assert bool((variance > 1e-9).any())


@both_modes
def test_queries_without_any_variance_are_the_norms_bias(training: bool) -> None:
    world = make_world(query_norm="batch")
    with torch.no_grad():
        world.model.pluglm.layers[2].query_proj.weight.zero_()
    wanted = compare_everything(world, EXACT, training=training)
    if training:
        bias = world.model.pluglm.layers[2].query_norm.bias
        assert_close(wanted.values["layer2.query"], bias.expand(4, -1), 1e-12, "query")


@both_modes
@both_layouts
def test_short_queries_and_keys(legacy: bool, training: bool) -> None:
    """Just above the cosine's 1e-8, where its gradient is large and a larger epsilon would show."""
    world = make_world(query_norm="none", legacy=legacy)
    shorten(world, 1e-7)
    wanted = compare_everything(world, EXACT, training=training)
    for part in ("query", "key"):
        lengths = wanted.values[f"layer2.{part}"].norm(dim=-1)
        assert bool((lengths > 1e-8).all())
        assert bool((lengths < 1e-6).all())


@both_layouts
def test_queries_and_keys_shorter_than_the_cosines_epsilon(legacy: bool) -> None:
    world = make_world(query_norm="none", legacy=legacy)
    shorten(world, 2e-9)
    with torch.no_grad():
        wanted = world.reference(leaves(world.model), training=False)
    assert bool((wanted.values["layer2.key"].norm(dim=-1) < 1e-8).any())
    kept = world.inputs["attention_mask"].bool()
    assert_close(logits(world)[kept], wanted.logits[kept], EXACT, "logits")


def test_a_key_of_zeros_has_finite_gradients() -> None:
    """As an entry without tokens has in a new model, whose biases are zero."""
    world = make_world()
    with torch.no_grad():
        world.model.pluglm.entry_encoder.key_proj.bias.zero_()
    given = world.model.train()(**world.inputs, **world.targets, lookup=world.memory.lookup)
    assert bool((given.retrievals[0].key_BKQ == 0).all(-1).any())
    given.loss.backward()
    assert all(
        bool(p.grad.isfinite().all()) for p in world.model.parameters() if p.grad is not None
    )


def shorten(world: World, by: float) -> None:
    """Scale queries and keys."""
    layer, encoder = world.model.pluglm.layers[2], world.model.pluglm.entry_encoder
    with torch.no_grad():
        for linear in (layer.query_proj, encoder.key_proj):
            linear.weight.mul_(by)
            linear.bias.mul_(by)


@both_modes
def test_every_layer_norm_has_the_models_epsilon(training: bool) -> None:
    compare_everything(make_world(layer_norm_eps=0.3), EXACT, training=training)
