"""The published layout, case by case, against the float64 reference.

With reference numbers of the published code itself at hand, tests/golden compares with these too.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.reference.comparison import compare_everything
from tests.reference.worlds import World, make_world

EXACT, SINGLE = 1e-9, 1e-5

KEPT = {
    "stale-keys": {},
    "fixed-keys": {"fixed_keys": True},
    "fixed-values": {"fixed_values": True},
    "fixed-keys-and-values": {"fixed_keys": True, "fixed_values": True},
}
CASES: dict[str, dict[str, Any]] = {
    f"{layers}-memory-layers-ffn-{ffn}-{kept}-{norm}-{attention}": {
        "num_memory_layers": layers,
        "memory_ffn_size": ffn,
        "query_norm": norm,
        "memory_attention": attention,
    }
    | KEPT[kept]
    for layers, ffn, kept, norm, attention in itertools.product(
        (1, 2), (12, 0), KEPT, ("batch", "none"), ("multi_head", "sentence_level")
    )
}


def legacy_world(**settings: Any) -> World:
    return make_world(legacy=True, **settings)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_every_number_in_float64(case: str, training: bool) -> None:
    wanted = compare_everything(legacy_world(**CASES[case]), EXACT, training=training)
    assert len(wanted.ids) == CASES[case]["num_memory_layers"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "case",
    [
        f"{layers}-memory-layers-ffn-{ffn}-{kept}-{norm}-{attention}"
        for layers, ffn, kept, norm, attention in (
            (1, 12, "stale-keys", "batch", "multi_head"),
            (2, 0, "stale-keys", "none", "multi_head"),
            (1, 12, "fixed-keys-and-values", "batch", "multi_head"),
            (2, 12, "fixed-keys-and-values", "none", "sentence_level"),
            (1, 0, "stale-keys", "batch", "sentence_level"),
        )
    ],
)
def test_every_number_in_float32(case: str, training: bool) -> None:
    world = legacy_world(**CASES[case])
    world.model.float()
    compare_everything(world, SINGLE, training=training)


def test_the_published_layout_is_another_model() -> None:
    """So that the cases above could not pass by the default's mathematics."""
    published, ours = legacy_world(), make_world()
    ours.model.pluglm.load_state_dict(published.model.pluglm.state_dict())
    kept = published.inputs["attention_mask"].bool()
    given = [
        world.model.pluglm.eval()(**world.inputs, lookup=published.memory.lookup).last_hidden_state[
            kept
        ]
        for world in (published, ours)
    ]
    assert float((given[0] - given[1]).abs().max().detach()) > 0.1
