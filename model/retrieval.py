"""What the model asks of a memory, and what it tells about an answer. Knows no memory itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RetrievedEntries(Protocol):
    """The part of a memory's answer that a memory layer reads: K entries of S tokens per query."""

    @property
    def ids(self) -> Tensor:
        """int64 [B,K]; -1 marks a place with no entry."""

    @property
    def tokens(self) -> Tensor:
        """int64 [B,K,S], padded with the pad token."""

    @property
    def doc_ids(self) -> Tensor:
        """int64 [B,K]; -1 marks a place with no entry."""


Lookup = Callable[[Tensor], RetrievedEntries]
"""Top-K entries for queries [B,Q] float32, detached; no gradient flows through it."""


@dataclass(frozen=True, kw_only=True)
class LayerRetrieval:
    """What one memory layer asked for and got.

    Attributes:
        layer: index of the layer, from 0.
        query_BQ: the query, with gradient.
        key_BKQ: the entries' fresh keys, with gradient.
        retrieved: the memory's answer.
        attention_BATK: share of each entry in each position's and head's knowledge attention (an
            entry's tokens summed), only when asked for. A is 1 for sentence-level attention.
    """

    layer: int
    query_BQ: Tensor
    key_BKQ: Tensor
    retrieved: RetrievedEntries
    attention_BATK: Tensor | None = None
