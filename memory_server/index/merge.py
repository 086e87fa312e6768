"""Order by score, then by id: the one rule that makes 1 shard and 16 answer identically."""

import numpy as np
import numpy.typing as npt
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


def best_hits(
    scores_BM: npt.NDArray[np.float32], ids_BM: npt.NDArray[np.int64], k: int
) -> npt.NDArray[np.int64]:
    """Where the k best of each row lie, counted through the whole array; by the same rule.

    With numpy: to merge some shards' hits of a few queries, torch takes five times as long.

    Args:
        scores_BM: -inf in pads. ids_BM: -1 in pads.
        k: 1 <= k <= M.

    Returns:
        int64 [B, k], for `take`.

    Raises:
        ValueError: k is out of range, or the shapes differ.
    """
    rows, hits = scores_BM.shape
    if ids_BM.shape != scores_BM.shape:
        raise ValueError(f"scores {scores_BM.shape} and ids {ids_BM.shape} must both be [B, M]")
    if not 1 <= k <= hits:
        raise ValueError(f"k={k} is out of range: {hits} hits allow 1 to {hits}")
    row_starts_B1 = np.arange(0, rows * hits, hits)[:, None]
    at_BM = np.argsort(-scores_BM, axis=1, kind="stable") + row_starts_B1
    sorted_BM = scores_BM.take(at_BM)
    tied_BK = sorted_BM[:, 1 : k + 1] == sorted_BM[:, :k][:, : hits - 1]
    if (tied_BK & (sorted_BM[:, 1 : k + 1] > -np.inf)).any():
        at_BM = np.lexsort((ids_BM, -scores_BM), axis=1) + row_starts_B1
    return at_BM[:, :k]
