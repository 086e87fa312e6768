"""The attentive pooler at the edges of its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.pooling import AttentivePooler


def pooler_with_scores(scores: list[float]) -> tuple[AttentivePooler, Tensor]:
    """A float32 pooler and an input x [1,T,T+1] whose tokens get exactly these scores."""
    pooler = AttentivePooler(len(scores) + 1)
    with torch.no_grad():
        # tanh(x_0) is the same 0.5 for all; the rest of x is one-hot and the weights tell it apart.
        pooler.att_fc1.weight.copy_(torch.eye(len(scores) + 1))
        pooler.att_fc1.bias.zero_()
        pooler.att_fc2.weight.copy_(torch.tensor([[0.0, *scores]]) / math.tanh(1))
        pooler.att_fc2.bias.zero_()
    x = torch.cat([torch.full((len(scores), 1), 2.0), torch.eye(len(scores))], 1)[None]
    return pooler, x


@pytest.mark.parametrize(
    "scores", [[-18.0, -19.5, -17.0], [-60.0, -61.0, -59.0], [-18.4, 0.0, 3.0]]
)
def test_the_epsilon_counts_where_the_weights_are_small(scores: list[float]) -> None:
    pooler, x = pooler_with_scores(scores)
    a = [math.exp(s) for s in scores]
    pooled = pooler(x, torch.ones(1, 3))[0].detach()
    for t, weight in enumerate(a):
        wanted = weight / (sum(a) + 1e-8)
        assert float(pooled[t + 1]) == pytest.approx(wanted, rel=3e-5)
    assert float(pooled[0]) == pytest.approx(2 * sum(a) / (sum(a) + 1e-8), rel=3e-5)


def test_a_large_score_is_finite_and_right() -> None:
    pooler, x = pooler_with_scores([100.0, 99.0, -60.0])
    x.requires_grad_()
    pooled = pooler(x, torch.ones(1, 3))
    wanted = 1 / (1 + math.exp(-1))
    assert float(pooled[0, 1].detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(pooled[0, 2].detach()) == pytest.approx(1 - wanted, rel=1e-4)
    assert float(pooled[0, 3].detach()) == 0.0
    pooled.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pooler.parameters())


def test_a_masked_token_counts_for_nothing_however_large_its_score() -> None:
    pooler, x = pooler_with_scores([1.0, 300.0, -1.0])
    x.requires_grad_()
    pooled = pooler(x, torch.tensor([[1, 0, 1]]))
    wanted = math.exp(1) / (math.exp(1) + math.exp(-1))
    assert float(pooled[0, 1].detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(pooled[0, 2].detach()) == 0.0
    pooled.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[0, 1].any()


def test_a_row_without_tokens_pools_to_zero_beside_others_that_do_not() -> None:
    pooler, x = pooler_with_scores([1.0, 2.0])
    both = torch.cat([x, x]).requires_grad_()
    pooled = pooler(both, torch.tensor([[False, False], [True, True]]))
    assert torch.equal(pooled[0], torch.zeros(3))
    assert torch.equal(pooled[1], pooler(x, torch.ones(1, 2))[0])
    pooled.sum().backward()
    assert both.grad is not None
    assert both.grad.isfinite().all()
    assert not both.grad[0].any()


def test_half_precision_inputs_are_weighed_in_float32() -> None:
    pooler, x = pooler_with_scores([-18.0, -19.5, -17.0])
    # exp(-18) is below the smallest float16: weighed in float16 nothing would be left.
    pooled = pooler.half()(x.half(), torch.ones(1, 3)).detach()
    assert pooled.dtype == torch.float16
    a = [math.exp(s) for s in (-18.0, -19.5, -17.0)]
    for t, weight in enumerate(a):
        assert float(pooled[0, t + 1]) == pytest.approx(weight / (sum(a) + 1e-8), rel=0.03)
