"""What a shard asks of an index over its keys, and the settings that say which index.

An index is immutable: a new epoch builds a new one, out of what did not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.index.recall_gate import RecallGate
from memory_server.keys.key_blocks import BlockedKeys
from memory_server.keys.key_codes import KEY_DTYPES, KeyDtype

ExactKeys = Callable[[npt.NDArray[np.int64]], Tensor]
"""Rows, int64 [n], to their exact keys, float32 [n, Q]: made again from the entries' tokens."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Which index a shard builds, and when it may answer.

    Attributes:
        kind: "flat" (exact); or approximate: a preset ("ivf", "pq", see faiss_presets.py), or a
            FAISS factory string such as "IVF4096,Flat".
        key_dtype: how keys are held; winners are scored by their exact keys whatever it is.
        search: FAISS search parameters, such as "nprobe=8"; empty: the preset's or FAISS's own.
        train_rows: keys of a block that a FAISS index is trained on; 0: as many as it needs.
        min_recall: an approximate index answers only while its recall on the searches' own
            queries is at least this; otherwise search is exact.
        audit_every_s: seconds between two measurements of the recall.
    """

    kind: str = "flat"
    key_dtype: KeyDtype = "float32"
    search: str = ""
    train_rows: int = 0
    min_recall: float = 0.95
    audit_every_s: float = 60.0

    def __post_init__(self) -> None:
        if self.key_dtype not in KEY_DTYPES:
            raise ValueError(f"key_dtype={self.key_dtype!r}; allowed: {', '.join(KEY_DTYPES)}")
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"min_recall={self.min_recall} is out of range; allowed: 0 to 1")
        if self.train_rows < 0 or self.audit_every_s <= 0:
            raise ValueError(
                f"train_rows={self.train_rows} must not be negative, and audit_every_s="
                f"{self.audit_every_s} must be greater than 0"
            )

    def describe(self) -> str:
        """In a few words, as `MemoryInfo.index` says it."""
        parts = [self.kind]
        if self.search:
            parts.append(self.search)
        if self.key_dtype != "float32":
            parts.append(self.key_dtype)
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class IndexInput:
    """The rows of one epoch, all on the keys' device.

    Attributes:
        ids_N: int64, unique among rows that are not dead.
        doc_ids_N: int64.
        dead_rows: int64, ascending: rows that are never returned.
        exact_keys: gives exact keys where `keys` holds codes; needed unless `keys.exact`.
    """

    keys: BlockedKeys
    ids_N: Tensor
    doc_ids_N: Tensor
    dead_rows: Tensor
    exact_keys: ExactKeys | None = None


@dataclass(frozen=True, kw_only=True)
class Hits:
    """An index's best rows, best first; ties have the lower id first.

    Attributes:
        rows: int64 [B, K] rows of the index; -1 pads.
        scores: float32 [B, K] inner products of the exact keys; -inf pads.
        exact: whether it is certain that no better row was missed.
    """

    rows: Tensor
    scores: Tensor
    exact: bool = True


class Index(Protocol):
    """Top-k over one shard's keys of one epoch."""

    @property
    def bytes(self) -> int:
        """What the index holds beside the keys, ids and documents that it was given."""
        ...

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids_B: Tensor | None,
        *,
        exact: bool = False,
    ) -> Hits:
        """Exactly k columns; removed rows and excluded documents are masked inside the top-k.

        Args:
            queries_BQ: float32, finite, on the keys' device.
            k: at least 1; beyond the eligible rows the reply is padded.
            exclude_doc_ids_B: int64, -1 for none; None for none at all.
            exact: do not answer approximately, whatever the settings allow.
        """
        ...


@runtime_checkable
class GatedIndex(Index, Protocol):
    """An index whose answers are approximate while its gate is open."""

    @property
    def gate(self) -> RecallGate: ...

    def search_approximately(
        self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        """Answer as with an open gate, so that a closed one can be measured; else as `search`."""
        ...

    def search_every_key(
        self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        """Answer as with a closed gate: what the recall is measured against. Of keys held as codes
        a few queries can miss a row that rounding hides; to make all keys anew for these would
        take longer than the measurement is worth."""
        ...

    def tune(
        self, recent: "RecentQueries", rest: Callable[[float], None] | None = None
    ) -> "RecentQueries":
        """Choose how much a search looks at, if that is not given, by some of these queries.

        Args:
            recent: at least recall_gate.MIN_QUERIES.
            rest: called after each search with the seconds that it took.

        Returns:
            MIN_QUERIES of them to judge the recall by, others where there are enough.
        """
        ...

    def describe(self) -> str:
        """What `tune` chose, for people; empty if nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class RecentQueries:
    """Queries that were searched lately: what an approximate index must be good at.

    Attributes:
        queries_nQ: float32.
        exclude_doc_ids_n: int64, -1 for none.
        k: how many entries were asked for.
    """

    queries_nQ: Tensor
    exclude_doc_ids_n: Tensor
    k: int

    @property
    def count(self) -> int:
        return self.queries_nQ.shape[0]

    def sample(self, count: int) -> Self:
        """At most `count` of them, evenly spread."""
        if self.count <= count:
            return self
        return self.where(torch.arange(count) * self.count // count)

    def where(self, chosen: Tensor) -> Self:
        """Some of them: positions, or bool [n]."""
        return type(self)(
            queries_nQ=self.queries_nQ[chosen],
            exclude_doc_ids_n=self.exclude_doc_ids_n[chosen],
            k=self.k,
        )
