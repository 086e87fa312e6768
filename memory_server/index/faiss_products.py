"""Inner products of queries with keys that lie anywhere in memory, without gathering the keys."""

import faiss
import numpy as np
import torch
from torch import Tensor

from memory_server.index.faiss_kinds import torch_threads


def inner_products_at(queries_BQ: Tensor, keys_NQ: Tensor, rows_BM: Tensor) -> Tensor:
    """Of each query with the keys of its own rows, float32 [B, M]; -inf for rows below 0.

    Args:
        queries_BQ, keys_NQ: float32, contiguous, on the CPU.
        rows_BM: int64, below N.
    """
    rows = rows_BM.contiguous().numpy()
    products = np.empty(rows.shape, dtype=np.float32)
    given = (products, queries_BQ.contiguous().numpy(), keys_NQ.numpy(), rows)
    with torch_threads(rows.size):
        faiss.fvec_inner_products_by_idx(
            *map(faiss.swig_ptr, given), keys_NQ.shape[1], rows.shape[0], rows.shape[1]
        )
    return torch.from_numpy(products).masked_fill_(rows_BM < 0, float("-inf"))
