"""Small worlds of keys in blocks for the tests of indexes, and the plainest search over them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from memory_server.index.base import ExactKeys, IndexInput, RecentQueries
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes, KeyDtype


def clustered_keys(count: int, width: int, *, clusters: int = 50, seed: int = 0) -> Tensor:
    """Keys around random centres, as a trained encoder's are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    nearest = torch.randint(clusters, (count,), generator=generator)
    return centres[nearest] + 0.3 * torch.randn(count, width, generator=generator)


def near(keys: Tensor, count: int, *, seed: int = 1) -> Tensor:
    """Queries that look like the keys."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(keys), (count,), generator=generator)
    return keys[chosen] + 0.1 * torch.randn(count, keys.shape[1], generator=generator)


def recent(queries: Tensor, k: int = 5) -> RecentQueries:
    nothing = torch.full((len(queries),), -1, dtype=torch.int64)
    return RecentQueries(queries_nQ=queries, exclude_doc_ids_n=nothing, k=k)


def block_of(
    keys: Tensor,
    *,
    segment: str | None = "segment",
    first: int = 0,
    dtype: KeyDtype = "float32",
) -> KeyBlock:
    """A block of rows first, first + 1, ... of a segment; None: of no segment."""
    codes = KeyCodes.empty(len(keys), keys.shape[1], dtype, keys.device)
    codes.put(0, keys)
    return KeyBlock(
        codes=codes,
        largest_norm=float(torch.linalg.vector_norm(keys, dim=1).max()) if len(keys) else 0.0,
        checksum=0,
        origin=None if segment is None else (segment, first, first + len(keys)),
    )


def rows_of(
    parts: Sequence[tuple[KeyBlock, int, int]],
    *,
    ids: Tensor | None = None,
    docs: Tensor | None = None,
    dead: Collection[int] = (),
    exact_keys: ExactKeys | None = None,
    device: str = "cpu",
) -> IndexInput:
    width = parts[0][0].codes.width
    keys = BlockedKeys(parts, width, torch.device(device))
    plain = torch.arange(keys.rows)
    return IndexInput(
        keys=keys,
        ids_N=(plain if ids is None else ids).to(device),
        doc_ids_N=(plain if docs is None else docs).to(device),
        dead_rows=torch.tensor(sorted(dead), dtype=torch.int64, device=device),
        exact_keys=exact_keys,
    )


def by_full_sort(
    keys_NQ: Tensor,
    queries_BQ: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    docs: Tensor | None = None,
    dead: Collection[int] = (),
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows and float32 scores of the k best, by two stable sorts of all scores; -1 and -inf pad."""
    ids = torch.arange(len(keys_NQ)) if ids is None else ids
    docs = ids if docs is None else docs
    by_id = ids.argsort(stable=True)
    rows_BK = torch.full((len(queries_BQ), k), -1)
    scores_BK = torch.full((len(queries_BQ), k), float("-inf"))
    for b, query in enumerate(queries_BQ.double()):
        allowed = torch.ones(len(keys_NQ), dtype=torch.bool)
        allowed[sorted(dead)] = False
        if exclude is not None:
            allowed &= docs != exclude[b]
        scores = (keys_NQ.double() * query).sum(1).float()
        order = by_id[scores[by_id].argsort(descending=True, stable=True)]
        best = order[allowed[order]][:k]
        rows_BK[b, : len(best)] = best
        scores_BK[b, : len(best)] = scores[best]
    return rows_BK, scores_BK
