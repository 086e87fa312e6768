"""What a shard asks of an index over its keys. It is immutable: a new epoch builds a new one."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

INDEX_KINDS = ("flat",)


@dataclass(frozen=True, kw_only=True)
class Hits:
    """An index's best rows, best first; ties have the lower id first.

    Attributes:
        rows: int64 [B, K] rows of the index; -1 pads.
        scores: float32 [B, K] inner products; -inf pads.
    """

    rows: Tensor
    scores: Tensor


class Index(Protocol):
    """Top-k over one shard's keys of one epoch."""

    @property
    def bytes(self) -> int:
        """What the index holds beside the keys, ids and documents that it was given."""
        ...

    def search(self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None) -> Hits:
        """Exactly k columns; removed rows and excluded documents are masked inside the top-k.

        Args:
            queries_BQ: float32, finite, on the keys' device.
            k: at least 1; beyond the eligible rows the reply is padded.
            exclude_doc_ids_B: int64, -1 for none; None for none at all.
        """
        ...


def check_index_kind(kind: str) -> None:
    """Raise ValueError for an index that does not exist."""
    if kind not in INDEX_KINDS:
        raise ValueError(f"index={kind!r} is not known; allowed: {', '.join(INDEX_KINDS)}")
