"""This project's reference against the published numbers, and the model on what these lack.

The files hold live keys only. With stored keys and values fixed, the reference, which has just
been shown to compute what the published code computes, says what is right on the same weights.
"""

from __future__ import annotations

import pytest
import torch

from model.published import our_name
from tests.golden.numbers import NEEDED, RELATIVE, build, load
from tests.reference.comparison import compare_everything, reference_pass
from tests.reference.worlds import assert_close

pytestmark = NEEDED


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["tiny_m1", "tiny_m1_stale"])
def test_the_reference_gives_every_number_of_the_published_code(name: str, mode: str) -> None:
    golden = load(name)
    result, grads = reference_pass(build(golden), training=mode == "train")
    assert torch.equal(torch.stack(result.ids, 1), golden.part(f"{mode}.")["I"])
    assert result.loss is not None
    given = result.values | {"logits": result.logits, "loss": result.loss.reshape(1)}
    compared = {
        part: value
        for part, value in golden.part(f"{mode}.").items()
        if not part.startswith(("grad.", "after.", "I"))
    }
    assert len(compared) >= 15
    for part, value in compared.items():
        assert_close(given[part].reshape(value.shape), value, RELATIVE, part)
    norms = {our_name(n): norm for n, norm in golden.about[mode]["grad_norm"].items()}
    for part, value in golden.part(f"{mode}.grad.").items():
        assert_close(grads[our_name(part)], value, RELATIVE, part, max(norms.values()) * 1e-3)
    for part, norm in norms.items():
        assert float(grads[part].norm()) == pytest.approx(
            norm, rel=RELATIVE, abs=max(norms.values()) * 1e-7
        ), part


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["tiny_m1", "tiny_m1_stale"])
@pytest.mark.parametrize(
    "fixed", [(), ("fixed_keys",), ("fixed_values",), ("fixed_keys", "fixed_values")], ids=str
)
def test_fixed_vectors_on_the_published_weights(
    fixed: tuple[str, ...], name: str, training: bool
) -> None:
    world = build(load(name), **dict.fromkeys(fixed, True))
    assert not world.memory.tokens_NS[7].any(), "an entry without tokens is among them"
    compare_everything(world, RELATIVE, training=training)
