"""From a masked row of vectors to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

POOL_EPS = 1e-8


class AttentivePooler(nn.Module):
    """`a_t = exp(w2·tanh(W1 x_t + b1) + b2)·mask_t`, `out = Σ a_t x_t / (Σ a_t + 1e-8)`.

    Names follow the published checkpoints. Scores are shifted by their row's maximum before `exp`,
    which cancels in the ratio but for the epsilon, so that a score of 100 gives a finite result;
    the epsilon is scaled by the same shift, so the formula's value is unchanged wherever it is
    finite.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.att_fc1 = nn.Linear(hidden_size, hidden_size)
        self.att_fc2 = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool over the second-last axis.

        Args:
            x: [..., T, H].
            mask: bool or 0/1, [..., T]; a row of zeros pools to a zero vector.

        Returns:
            [..., H], in x's dtype; the weights are computed in at least float32.
        """
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        scores = self.att_fc2(torch.tanh(self.att_fc1(x))).squeeze(-1).to(wide)
        # Filled before exp: a masked score may lie so far above the kept ones that it overflows.
        scores = scores.masked_fill(~mask.to(torch.bool), float("-inf"))
        # A ratio is blind to the shift; clamping at 0 keeps exp(-shift)·eps from overflowing, and
        # the total from vanishing: it is at least 1 where the shift is positive, else at least eps.
        shift = scores.amax(-1, keepdim=True).clamp(min=0.0).detach()
        weights = torch.exp(scores - shift)
        alpha = weights / (weights.sum(-1, keepdim=True) + POOL_EPS * torch.exp(-shift))
        return (alpha.to(x.dtype).unsqueeze(-2) @ x).squeeze(-2)


class MeanPooler(nn.Module):
    """The mean over the kept positions; zero where none is kept."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., T, H], [..., T] -> [..., H]."""
        kept = mask.to(x.dtype)
        alpha = kept / kept.sum(-1, keepdim=True).clamp(min=1.0)
        return (alpha.unsqueeze(-2) @ x).squeeze(-2)


class MaxPooler(nn.Module):
    """The largest value of each component over the kept positions; zero where none is kept."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., T, H], [..., T] -> [..., H]."""
        kept = mask.to(torch.bool).unsqueeze(-1)
        largest = x.masked_fill(~kept, torch.finfo(x.dtype).min).amax(-2)
        return largest.masked_fill(~kept.any(-2), 0.0)


class ClsPooler(nn.Module):
    """The first position's vector; zero where that position is masked."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., T, H], [..., T] -> [..., H]."""
        return x[..., 0, :] * mask[..., :1].to(x.dtype)


def make_pooler(kind: str, hidden_size: int) -> nn.Module:
    """The module for `PlugLMConfig.entry_pooler` or `query_pooler`."""
    if kind == "attentive":
        return AttentivePooler(hidden_size)
    return {"mean": MeanPooler, "max": MaxPooler, "cls": ClsPooler}[kind]()
