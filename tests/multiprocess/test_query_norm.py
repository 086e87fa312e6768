"""The queries' BatchNorm over ranks equals one process that holds the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from model.query_norm import QueryBatchNorm
from tests.multiprocess.ranks import run_ranks

pytestmark = pytest.mark.multiprocess

WIDTH = 6
Numbers = dict[str, Tensor]


def sum_over_ranks(x: Tensor) -> Tensor:
    total: Tensor = all_reduce(x, op=dist.ReduceOp.SUM)
    return total


def two_steps(
    x_2BH: Tensor, weight_2BQ: Tensor, state: Numbers, *, over_ranks: bool = False
) -> Numbers:
    """Two training steps' outputs and gradients, and the statistics after them."""
    project = torch.nn.Linear(x_2BH.shape[2], WIDTH)
    norm = QueryBatchNorm(WIDTH)
    torch.nn.Sequential(project, norm).load_state_dict(state)
    if over_ranks:
        norm.reduce_sum = sum_over_ranks
    numbers: Numbers = {}
    for step, (x_BH, weight_BQ) in enumerate(zip(x_2BH, weight_2BQ, strict=True)):
        x_BH = x_BH.clone().requires_grad_()
        query_BQ = norm(project(x_BH))
        leaves = [x_BH, *project.parameters(), *norm.parameters()]
        # Not linear in the queries, or the statistics' part in the gradient could vanish.
        grads = torch.autograd.grad((query_BQ.tanh() * weight_BQ).sum(), leaves)
        numbers |= {f"{step}.queries": query_BQ.detach(), f"{step}.grad.x": grads[0]}
        numbers |= {f"{step}.grad.{i}": grad for i, grad in enumerate(grads[1:])}
    return numbers | {f"after.{name}": b.clone() for name, b in norm.named_buffers()}


def on_a_rank(rank: int, split: list[list[int]], *args: object) -> list[Numbers]:
    x_2BH, weight_2BQ, state = args
    assert isinstance(x_2BH, Tensor)
    assert isinstance(weight_2BQ, Tensor)
    assert isinstance(state, dict)
    results = []
    for sizes in split:
        first = sum(sizes[:rank])
        rows = slice(first, first + sizes[rank])
        results.append(two_steps(x_2BH[:, rows], weight_2BQ[:, rows], state, over_ranks=True))
    return results


def test_two_ranks_equal_one_process_with_both_halves() -> None:
    torch.manual_seed(0)
    x_2BH = torch.randn(2, 16, 5) * 2 + 3
    weight_2BQ = torch.randn(2, 16, WIDTH)
    state = torch.nn.Sequential(torch.nn.Linear(5, WIDTH), QueryBatchNorm(WIDTH)).state_dict()
    state["1.weight"], state["1.bias"] = torch.randn(WIDTH), torch.randn(WIDTH)
    wanted = two_steps(x_2BH, weight_2BQ, state)
    # Equal parts; unequal ones; and one sequence alone on its rank, which has no variance itself.
    split = [[8, 8], [11, 5], [15, 1]]
    both = run_ranks(on_a_rank, 2, split, x_2BH, weight_2BQ, state)
    for sizes, first, second in zip(split, *both, strict=True):
        for name, value in wanted.items():
            if name.startswith("after."):
                assert torch.equal(first[name], second[name]), "ranks keep the same statistics"
                given = first[name]
            elif name.endswith(("queries", "x")):
                given = torch.cat([first[name], second[name]])
            else:
                # A parameter's gradient: the engine sums what the ranks hold.
                given = first[name] + second[name]
            torch.testing.assert_close(
                given, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name, s=sizes: f"{s} {n}: {m}"
            )
    alone = two_steps(x_2BH[:, :8], weight_2BQ[:, :8], state)
    assert not torch.allclose(alone["0.queries"], wanted["0.queries"][:8], atol=0.05)
