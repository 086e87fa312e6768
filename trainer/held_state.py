"""Which part of the training state a rank holds, under every ZeRO stage, by parameter name.

DeepSpeed keeps float32 master weights and the optimizer's moments in three layouts: whole
parameters (stage 0), a rank's slice of all parameters laid end to end (stages 1 and 2), and a
rank's slice of every parameter (stage 3). Each is shown here as the same list of parts
``[start, start + numel)`` of flattened parameters, so that a checkpoint is written from one layout
and read into any other; `trainer.held_layouts` has the three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.lamb import Layout

WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of one parameter's state that is on this rank.

    Attributes:
        name, shape: of the parameter.
        start, numel: the part's place in the flattened parameter.
        trainable: whether it has moments.
        replicated: whether every rank holds the same.
        read: ``read(kind)``: float32 [numel] of kind "weight" or a moment's name; a view.
        write: ``write(kind, values)`` sets them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    trainable: bool
    replicated: bool
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], None]

    def cut(self, start: int, stop: int) -> Part:
        """Only the elements start..stop of this part (reading only)."""
        read = self.read
        return replace(
            self,
            start=self.start + start,
            numel=stop - start,
            read=lambda kind: read(kind)[start:stop],
        )


class HeldState(ABC):
    """The training state as this rank holds it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._model: nn.Module = engine.module

    @abstractmethod
    def parts(self) -> list[Part]:
        """Everything that this rank holds, in the model's order of parameters."""

    @abstractmethod
    def spread(self) -> None:
        """Bring the weights that the model computes with up to the master weights; collective."""

    @abstractmethod
    def _stores(self) -> Iterator[Tensor]:
        """The tensors that the optimizer keeps its state by, as they are on this rank."""

    def layouts(self) -> dict[int, Layout]:
        """What each of the optimizer's tensors is made of, by the tensor's id.

        Empty where each is one whole parameter.
        """
        return {}

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below DeepSpeed's wrappers."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        return inner

    def moments(self) -> list[str]:
        """Names of the optimizer's moments; none before its first step."""
        for store in self._stores():
            state = self._optimizer.state.get(store, {})
            return sorted(name for name in state if name != "step")
        return []

    def begin_moments(self, names: Sequence[str], step: int) -> None:
        """Make moments of zeros after so many steps, to be written to."""
        for store in self._stores():
            self._make(store, names, step)

    def _make(self, store: Tensor, names: Sequence[str], step: int) -> None:
        state = self._optimizer.state[store]
        state.clear()
        # As torch's optimizers make it: beside the weights, but for plain AdamW, which counts here.
        plain = self._optimizer.defaults.get("fused") is False
        state["step"] = torch.tensor(float(step), device="cpu" if plain else store.device)
        for name in names:
            state[name] = torch.zeros_like(store, requires_grad=False)

    def _state(self, store: Tensor, kind: str) -> Tensor:
        found: Tensor = store if kind == WEIGHT else self._optimizer.state[store][kind]
        return found.detach()


def dealt(parts: Sequence[Part], rank: int, ranks: int) -> list[Part]:
    """What a rank writes: its own, and an even share of what every rank holds."""
    total = sum(part.numel for part in parts if part.replicated)
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    chosen, before = [], 0
    for part in parts:
        if not part.replicated:
            chosen.append(part)
            continue
        start, stop = max(low - before, 0), min(high - before, part.numel)
        if start < stop:
            chosen.append(part.cut(start, stop))
        before += part.numel
    return chosen
