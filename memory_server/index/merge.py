"""Order by score, then by id: the one rule that makes 1 shard and 16 answer identically."""

import torch
from torch import Tensor


def order_hits(scores_BM: Tensor, ids_BM: Tensor) -> Tensor:
    """Positions that sort hits by descending score; ties have the lower id first, pads (-1) last.

    Args:
        scores_BM: float32, -inf in pads.
        ids_BM: int64.

    Returns:
        int64 [B, M], to be used with `gather(1, ...)`.
    """
    last = torch.iinfo(torch.int64).max
    by_id_BM = ids_BM.masked_fill(ids_BM < 0, last).argsort(dim=1, stable=True)
    by_score_BM = scores_BM.gather(1, by_id_BM).argsort(dim=1, descending=True, stable=True)
    return by_id_BM.gather(1, by_score_BM)


def merge_order(scores_GBK: Tensor, ids_GBK: Tensor, k: int) -> Tensor:
    """Where the global top-k lies among the shards' hits laid side by side, [B, G*K].

    Args:
        scores_GBK: inner products, float32; G shards, B queries, K hits each, -inf pads.
        ids_GBK: int64 entry ids, unique across shards; -1 pads.
        k: hits to keep, 1 <= k <= G*K.

    Returns:
        int64 [B, k], positions g*K + j.

    Raises:
        ValueError: k is out of range, or the shapes differ.
    """
    if scores_GBK.ndim != 3 or scores_GBK.shape != ids_GBK.shape:
        raise ValueError(
            f"scores {tuple(scores_GBK.shape)} and ids {tuple(ids_GBK.shape)} must both be [G, B, "
            "K]"
        )
    shards, _, hits = scores_GBK.shape
    if not 1 <= k <= shards * hits:
        raise ValueError(
            f"k={k} is out of range: {shards} shards with {hits} hits each allow 1 to "
            f"{shards * hits}"
        )
    return order_hits(side_by_side(scores_GBK), side_by_side(ids_GBK))[:, :k]


def side_by_side(hits_GBK: Tensor) -> Tensor:
    """[G, B, K, ...] to [B, G*K, ...]."""
    shards, batch, hits = hits_GBK.shape[:3]
    return hits_GBK.transpose(0, 1).reshape(batch, shards * hits, *hits_GBK.shape[3:])


def merge_top_k(scores_GBK: Tensor, ids_GBK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge the shards' hits into one global top-k.

    Args:
        scores_GBK: inner products, float32; G shards, B queries, K hits each, -inf pads.
        ids_GBK: int64 entry ids, unique across shards; -1 pads.
        k: hits to keep, 1 <= k <= G*K.

    Returns:
        (scores_Bk float32, descending; ids_Bk int64). Ties: the lower id first.

    Raises:
        ValueError: k is out of range.
    """
    order_Bk = merge_order(scores_GBK, ids_GBK, k)
    return side_by_side(scores_GBK).gather(1, order_Bk), side_by_side(ids_GBK).gather(1, order_Bk)
