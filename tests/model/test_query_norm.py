"""The queries' BatchNorm against PyTorch's own, on one process (ranks: tests/multiprocess)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.query_norm import QueryBatchNorm, make_query_norm


def pair(width: int, dtype: torch.dtype) -> tuple[QueryBatchNorm, nn.BatchNorm1d]:
    """Ours and PyTorch's with the same random state."""
    torch.manual_seed(0)
    ours, theirs = QueryBatchNorm(width).to(dtype), nn.BatchNorm1d(width).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
        assert theirs.running_mean is not None
        assert theirs.running_var is not None
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(0.5, 2.0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])
    return out.detach(), list(grads)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6], ids=lambda s: f"scale-{s:g}")
def test_steps_equal_torch_batchnorm(scale: float) -> None:
    # At scale 1e-3 the variance is about eps (1e-5), at 1e-6 far below it: a wrong eps shows.
    ours, theirs = pair(8, torch.float64)
    for step in range(3):
        x = scale * (torch.randn(5, 8, dtype=torch.float64) + 2 * step)
        (out, grads), (wanted, wanted_grads) = gradients(ours, x), gradients(theirs, x)
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
        for given, grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(given, grad, rtol=1e-8, atol=1e-8)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=0)
    ours.eval()
    theirs.eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert int(ours.num_batches_tracked) == 3


def test_a_mean_far_from_zero_does_not_cancel_in_float32() -> None:
    ours, _ = pair(8, torch.float32)
    _, theirs = pair(8, torch.float64)
    x = torch.randn(64, 8) + 1000.0
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-3, atol=1e-3)


def test_low_precision_queries_are_normalised_in_float32() -> None:
    ours, _ = pair(8, torch.float32)
    _, theirs = pair(8, torch.float64)
    x = torch.randn(16, 8).bfloat16()
    out = ours(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), theirs(x.double()), rtol=1e-5, atol=1e-5)


def test_a_single_sequence_is_refused_in_training_and_changes_nothing() -> None:
    norm = QueryBatchNorm(4)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(ValueError, match="at least 2 sequences"):
        norm(torch.randn(1, 4))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.eval()(torch.randn(1, 4)).shape == (1, 4)


def test_the_other_norms_are_torchs() -> None:
    x = torch.randn(3, 6)
    assert torch.equal(make_query_norm("none", 6)(x), x)
    torch.testing.assert_close(
        make_query_norm("layer", 6)(x), torch.nn.functional.layer_norm(x, (6,), eps=1e-5)
    )


def test_a_query_that_is_not_finite_leaves_the_running_statistics_as_they_were() -> None:
    norm = QueryBatchNorm(3)
    norm(torch.randn(4, 3))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    broken = torch.randn(4, 3)
    broken[1, 2] = float("nan")
    assert not norm(broken)[:, 2].isfinite().any()
    assert norm.running_mean[2] == before["running_mean"][2]
    assert norm.running_var[2] == before["running_var"][2]
    assert norm.running_mean.isfinite().all()
