"""BatchNorm for queries whose statistics are those of every data-parallel rank."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn

from model.recompute import is_recomputing

log = logging.getLogger(__name__)

EPS = 1e-5
MOMENTUM = 0.1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over all ranks of the default process group, differentiable; collective."""
    summed: Tensor = dist.nn.functional.all_reduce(x)
    return summed


class QueryBatchNorm(nn.Module):
    """BatchNorm1d over [B,Q], in float32, on CPU and GPU alike.

    `reduce_sum` is how the trainer makes the statistics those of all ranks: a differentiable sum
    over ranks. Without one the statistics are the local batch's. (`torch.nn.SyncBatchNorm` refuses
    CPU.)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.reduce_sum: Callable[[Tensor], Tensor] | None = None
        self._said = False

    def forward(self, x_BQ: Tensor) -> Tensor:
        wide = x_BQ.to(torch.promote_types(x_BQ.dtype, torch.float32))
        if self.training:
            mean_Q, var_Q = self._batch_statistics(wide)
        else:
            mean_Q, var_Q = self.running_mean, self.running_var
        normal = (wide - mean_Q) * torch.rsqrt(var_Q + EPS)
        return normal * self.weight + self.bias

    def _batch_statistics(self, x_BQ: Tensor) -> tuple[Tensor, Tensor]:
        count = x_BQ.new_full((1,), float(x_BQ.shape[0]))
        count, total_Q = self._sum_over_ranks(count, x_BQ.sum(0))
        mean_Q = total_Q / count
        # Two passes: E[x²]-E[x]² would cancel when the mean is far from zero.
        _, squares_Q = self._sum_over_ranks(count, (x_BQ - mean_Q).square().sum(0))
        var_Q = squares_Q / count
        n = float(count)
        if n < 2:
            raise ValueError(
                "query_norm 'batch' needs at least 2 sequences per step over all ranks"
            )
        if not is_recomputing():
            with torch.no_grad():
                self._move(self.running_mean, mean_Q)
                self._move(self.running_var, var_Q * n / (n - 1))
                self.num_batches_tracked += 1
        return mean_Q, var_Q

    @staticmethod
    def _move(running_Q: Tensor, batch_Q: Tensor) -> None:
        """Towards the batch's value; one that is not finite is left out (the search refuses it)."""
        moved_Q = running_Q.lerp(batch_Q.to(running_Q), MOMENTUM)
        running_Q.copy_(torch.where(moved_Q.isfinite(), moved_Q, running_Q))

    def _sum_over_ranks(self, count: Tensor, x_Q: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduce_sum is None:
            self._say_if_ranks_differ()
            return count, x_Q
        packed = self.reduce_sum(torch.cat([count.detach(), x_Q]))
        return packed[:1].detach(), packed[1:]

    def _say_if_ranks_differ(self) -> None:
        """Other ranks have other statistics, which is right only where they train other models."""
        if not self._said and dist.is_initialized() and dist.get_world_size() > 1:
            self._said = True
            log.warning(
                "query_norm 'batch' normalises with this rank's batch alone, though there are %d "
                "ranks; call model.share_statistics() once the process group is up",
                dist.get_world_size(),
            )


def make_query_norm(kind: str, width: int) -> nn.Module:
    """The module for `PlugLMConfig.query_norm`: [B,Q] -> [B,Q]."""
    if kind == "batch":
        return QueryBatchNorm(width)
    return nn.LayerNorm(width, eps=EPS) if kind == "layer" else nn.Identity()
