"""What the model asks of a memory, and what it tells about an answer. Knows no memory itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RetrievedEntries(Protocol):
    """The part of a memory's answer that a memory layer reads: K entries of S tokens per query.

    A memory of fixed vectors also has `keys`, float [B,K,Q], and `values`, float [B,K,J,H] (J is 1,
    or S for one value per token): `PlugLMConfig.fixed_keys` and `fixed_values` read these.
    """

    @property
    def ids(self) -> Tensor:
        """int64 [B,K]; -1 marks a place with no entry. Equal ids are the same entry."""

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
        key_BKQ: the entries' keys: fresh, with gradient, or the memory's own (`fixed_keys`).
        retrieved: the memory's answer.
        attention_BATK: share of each entry in each position's and head's knowledge attention (an
            entry's tokens summed), only when asked for. A is 1 for sentence-level attention.
        asking_BT: bool, which of these positions are tokens whose output is computed; beside it.
    """

    layer: int
    query_BQ: Tensor
    key_BKQ: Tensor
    retrieved: RetrievedEntries
    attention_BATK: Tensor | None = None
    asking_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReadEntries:
    """What a memory layer reads: the answer, and its entries' vectors.

    Attributes:
        retrieved: the memory's answer.
        keys_BKQ: keys for the cosine with the query.
        values_BKJH: J vectors per entry.
        mask_BKJ: bool, False where there is no entry or no token.
    """

    retrieved: RetrievedEntries
    keys_BKQ: Tensor
    values_BKJH: Tensor
    mask_BKJ: Tensor


ReadMemory = Callable[[Tensor], ReadEntries]
"""Queries [B,Q], with gradient, to what is read for them."""
