"""Activation checkpointing: a layer's activations are made again when its gradient is computed.

What a pass does to the world is done once: the memory is searched in the forward pass only, and
BatchNorm's running statistics move once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.retrieval import Lookup, RetrievedEntries

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Whether a layer runs a second time, for its gradient."""
    return _recomputing.get()


def run_layer(layer: nn.Module, recompute: bool, *args: Any, **options: Any) -> Any:
    """Call a layer; with `recompute` its activations are not kept but made again."""
    if not recompute:
        return layer(*args, **options)
    # Not the re-entrant kind: it knows only tensors as outputs, and no contexts.
    return checkpoint(layer, *args, use_reentrant=False, context_fn=_contexts, **options)


class AskedOnce:
    """A lookup that gives the first answer again, so that recomputing a layer reads the same."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.takes_any_query = bool(getattr(lookup, "takes_any_query", False))
        self._answer: RetrievedEntries | None = None

    def __call__(self, queries_BQ: Tensor) -> RetrievedEntries:
        if self._answer is None:
            self._answer = self._lookup(queries_BQ)
        return self._answer


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
