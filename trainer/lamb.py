"""LAMB (You et al., arXiv 1904.00962) that is right on ZeRO's slices of parameters.

Its trust ratio is of two norms of a whole parameter. Under ZeRO a tensor of the optimizer is a
slice of several parameters laid end to end, or a rank's slice of each; so each rank adds up the
squares of the elements that it has, parameter by parameter, and the sums are added over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Span:
    """Elements start..start+numel of an optimizer's tensor: a part of parameter `which`."""

    start: int
    numel: int
    which: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one of the optimizer's tensors is made of.

    Attributes:
        spans: the parameters' parts that are in it; padding is in none.
        parameters: how many parameters all ranks' tensors of this place hold parts of.
    """

    spans: tuple[Span, ...]
    parameters: int


class Lamb(torch.optim.Optimizer):
    """LAMB with decoupled weight decay and bias correction.

    The update is ``r = m̂ / (√v̂ + eps) + weight_decay · w``; a parameter moves by
    ``lr · (|w| / |r|) · r``, where the ratio is 1 if either norm is 0. As in the authors' recipe,
    parameters without weight decay (biases, normalisation) are not scaled by a ratio: they move as
    with Adam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        """See the class; a tensor is one whole parameter until `set_layouts` says otherwise."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._layouts: dict[int, Layout] = {}
        self._sum: Callable[[Tensor], Tensor] | None = None

    def set_layouts(
        self, layouts: Mapping[int, Layout], sum_over_ranks: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Say what the optimizer's tensors are made of.

        Args:
            layouts: by the tensors' `id`.
            sum_over_ranks: adds a float64 tensor up over the ranks in place, so that `step` becomes
                collective; None: every rank has whole parameters.
        """
        self._layouts, self._sum = dict(layouts), sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        assert closure is None, "DeepSpeed gives none"
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, group)

    def _update(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        beta_1, beta_2 = group["betas"]
        first.lerp_(tensor.grad, 1 - beta_1)
        second.mul_(beta_2).addcmul_(tensor.grad, tensor.grad, value=1 - beta_2)
        steps = state["step"].to(torch.float64)
        root = (second / (1 - beta_2**steps)).sqrt_().add_(group["eps"])
        change = (first / (1 - beta_1**steps)).div_(root)
        decay, rate = group["weight_decay"], group["lr"]
        if not decay:
            tensor.add_(change, alpha=-rate)
            return
        change.add_(tensor, alpha=decay)
        flat, move = tensor.view(-1), change.view(-1)
        layout = self._layouts.get(id(tensor)) or _whole(tensor)
        ratios = self._trust_ratios(flat, move, layout)
        for span in layout.spans:
            part = slice(span.start, span.start + span.numel)
            # The ratio stays on the device: nothing waits for it.
            flat[part].sub_(move[part] * (rate * ratios[span.which]).to(move.dtype))

    def _trust_ratios(self, flat: Tensor, move: Tensor, layout: Layout) -> Tensor:
        """float64 [parameters]."""
        squares = torch.zeros(2, layout.parameters, dtype=torch.float64, device=flat.device)
        for span in layout.spans:
            part = slice(span.start, span.start + span.numel)
            for row, values in enumerate((flat, move)):
                norm = torch.linalg.vector_norm(values[part], dtype=torch.float64)
                squares[row, span.which] += norm.square()
        if self._sum is not None:
            squares = self._sum(squares)
        norms = squares.sqrt()
        known = (norms > 0).all(0)
        return torch.where(known, norms[0] / norms[1].clamp(min=1e-300), torch.ones_like(norms[0]))


def _whole(tensor: Tensor) -> Layout:
    return Layout(spans=(Span(start=0, numel=tensor.numel(), which=0),), parameters=1)
