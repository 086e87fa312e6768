"""Exact inner-product search by torch, on CPU or GPU, without ever holding the B x N score matrix.

Of every 32 rows the best score tells whether the group can hold a winner; only the rows of the few
best groups are scored one by one. What that product says only *proposes*: winners are scored again
in float64, by their exact keys, by a sum whose order is fixed, so a score depends on nothing but
the query and the key: not on the block, the number of shards, the threads, the device or the codes
that the keys are held as. A bound on the errors of the product then certifies that no other row can
be among the winners. A query that cannot be certified (many equal keys, say) is searched in float64
throughout, if the keys are held exactly or if that is asked for.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.index.base import Hits, IndexInput
from memory_server.index.candidates import EXTRA_ROWS, Candidates, by_codes, by_keys, rounding_bound
from memory_server.index.masked_cells import NEGATIVE_INFINITY, BarredRows
from memory_server.index.merge import order_hits
from memory_server.index.row_groups import GROUP_ROWS, RowGroups
from memory_server.index.search_queries import SearchQueries

QUERY_BLOCK = 512
CANDIDATE_SCORES = {"cpu": 1 << 23, "cuda": 1 << 28}
FLOAT64_ROWS = {"cpu": 1 << 12, "cuda": 1 << 16}  # scored at once
FEW, SECOND_ROOM = 16, 8  # if 1 in so many queries is doubtful, it has so much more room
EXACT_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
Terms = TypeVar("Terms", Tensor, npt.NDArray[np.float64])


class FlatIndex:
    """Top-k over keys in blocks, which are used as they lie."""

    def __init__(self, rows: IndexInput) -> None:
        """Take the rows as they are.

        Raises:
            ValueError: keys are held as codes, and nothing gives the exact ones.
        """
        if not rows.keys.exact and rows.exact_keys is None:
            raise ValueError("keys are held as codes, so the index needs exact_keys, too")
        self._keys = rows.keys
        self._exact_keys = rows.exact_keys
        self._ids_N = rows.ids_N
        self._barred = BarredRows(rows.doc_ids_N, rows.dead_rows)
        self._groups = RowGroups(rows.keys)
        self._rows = rows.keys.rows
        self._device = rows.keys.device

    @property
    def bytes(self) -> int:
        return self._barred.bytes + self._groups.bytes

    @torch.no_grad()
    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids_B: Tensor | None,
        *,
        exact: bool = False,
    ) -> Hits:
        """Return exactly k columns; see `memory_server.index.base.Index.search`.

        Of keys held as codes a reply is `exact` if every query was certified, as most are. With
        `exact` asked for, a query that was not is searched by the exact keys of all rows, which
        are made anew for it.
        """
        each = (k + EXTRA_ROWS) * max(GROUP_ROWS, k)
        at_once = min(QUERY_BLOCK, max(1, CANDIDATE_SCORES[self._device.type] // each))
        found = min(k, self._rows)
        rows_Bk = torch.full((len(queries_BQ), k), -1, dtype=torch.int64, device=self._device)
        scores_Bk = torch.full((len(queries_BQ), k), NEGATIVE_INFINITY, device=self._device)
        certain = True
        for start in range(0, len(queries_BQ) if found else 0, at_once):
            block = slice(start, start + at_once)
            excluded = None if exclude_doc_ids_B is None else exclude_doc_ids_B[block]
            queries = SearchQueries(queries_BQ[block])
            rows, scores, sure = self._search_block(queries, found, excluded, exact=exact)
            rows_Bk[block, :found], scores_Bk[block, :found] = rows, scores
            certain = certain and sure
        return Hits(rows=rows_Bk, scores=scores_Bk, exact=certain)

    def _search_block(
        self, queries: SearchQueries, k: int, excluded_B: Tensor | None, *, exact: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """(rows int64 [B, k], scores float32 [B, k], whether nothing can have been missed)."""
        rows_BK, scores_BK, doubtful = self._certify(queries, k, excluded_B)
        if not self._keys.exact and 0 < len(doubtful) <= max(1, queries.batch // FEW):
            excluded = None if excluded_B is None else excluded_B[doubtful]
            rows_BK[doubtful], scores_BK[doubtful], still = self._certify(
                SearchQueries(queries.exact_BQ[doubtful]), k, excluded, room=SECOND_ROOM
            )
            doubtful = doubtful[still]
        if not len(doubtful):
            return rows_BK, scores_BK, True
        if not (self._keys.exact or exact):
            return rows_BK, scores_BK, False
        excluded = None if excluded_B is None else excluded_B[doubtful]
        queries_DQ = queries.exact_BQ[doubtful]
        rows_DM = self._search_in_float64(queries_DQ, k, excluded)
        scores_DM = self._exact_scores(queries_DQ, rows_DM)
        rows_BK[doubtful], scores_BK[doubtful] = self._best(rows_DM, scores_DM, k)
        return rows_BK, scores_BK, True

    def _certify(
        self, queries: SearchQueries, k: int, excluded_B: Tensor | None, *, room: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [B, k], scores [B, k], which queries may have a better row, int64)."""
        candidates = self._candidates(queries, k, excluded_B, room)
        rows_BM, scores_BM = candidates.rows_BM, candidates.scores_BM
        if scores_BM is None:
            scores_BM = self._exact_scores(queries.exact_BQ, rows_BM)
        rows_BK, scores_BK = self._best(rows_BM, scores_BM, k)
        rest_B = candidates.rest_B
        certain_B = (rest_B == NEGATIVE_INFINITY) | (rest_B < scores_BK[:, -1])
        return rows_BK, scores_BK, (~certain_B).nonzero().squeeze(1)

    def _candidates(
        self, queries: SearchQueries, k: int, excluded_B: Tensor | None, room: int
    ) -> Candidates:
        bound_B = rounding_bound(queries, self._keys)
        if self._keys.exact:
            return by_keys(queries, self._groups, k, self._barred, excluded_B, bound_B)
        return by_codes(
            queries,
            self._keys,
            self._groups,
            k,
            self._barred,
            excluded_B,
            bound_B,
            lambda rows_BM: self._exact_scores(queries.exact_BQ, rows_BM),
            room=room,
        )

    def _best(self, rows_BM: Tensor, scores_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        if (missing := k - rows_BM.shape[1]) > 0:
            rows_BM = torch.nn.functional.pad(rows_BM, (0, missing), value=-1)
            scores_BM = torch.nn.functional.pad(scores_BM, (0, missing), value=NEGATIVE_INFINITY)
        ids_BM = self._ids_N[rows_BM.clamp(min=0)].masked_fill(rows_BM < 0, -1)
        order_BK = order_hits(scores_BM, ids_BM)[:, :k]
        return rows_BM.gather(1, order_BK), scores_BM.gather(1, order_BK)

    def _exact_scores(self, queries_BQ: Tensor, rows_BM: Tensor) -> Tensor:
        """Of rows, -1 for none, float32 [B, M]; -inf for none."""
        at_once = max(1, EXACT_BYTES[self._device.type] // ((rows_BM.shape[1] + 1) * 8 * 128))
        if self._keys.exact:
            parts = [
                exact_inner_products(queries, self._keys.gather(rows))
                for rows, queries in zip(
                    rows_BM.clamp(min=0).split(at_once), queries_BQ.split(at_once), strict=True
                )
            ]
        else:
            # Each row's key is made once, for all queries of which it is a candidate.
            unique_n = rows_BM[rows_BM >= 0].unique()
            keys_nQ = self._exact(unique_n)
            places_BM = torch.searchsorted(unique_n, rows_BM.clamp(min=0))
            places_BM = places_BM.masked_fill_(rows_BM < 0, 0)
            parts = [
                exact_inner_products(queries, keys_nQ[places])
                for places, queries in zip(
                    places_BM.split(at_once), queries_BQ.split(at_once), strict=True
                )
            ]
        return torch.cat(parts).masked_fill_(rows_BM < 0, NEGATIVE_INFINITY)

    def _exact(self, rows_n: Tensor) -> Tensor:
        """Exact keys of rows, float32 [n, Q]: those held, and the others made anew.

        One key at least, whatever it is, so that places may be looked up in it.
        """
        keys_nQ = torch.zeros(max(1, len(rows_n)), self._keys.width, device=self._device)
        rows = rows_n.cpu().numpy()
        held_n = torch.from_numpy(self._keys.exact_rows(rows)).to(self._device)
        if bool(held_n.any()):
            keys_nQ[: len(rows_n)][held_n] = self._keys.gather(rows_n[held_n])
        if not bool(held_n.all()):
            assert self._exact_keys is not None
            made = rows_n[~held_n].cpu().numpy()
            keys_nQ[: len(rows_n)][~held_n] = self._exact_keys(made).to(self._device)
        return keys_nQ

    def _search_in_float64(self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None) -> Tensor:
        """The k best rows (and EXTRA_ROWS more), by a product in float64; int64, -1 pads."""
        batch, wanted = queries_BQ.shape[0], k + EXTRA_ROWS
        queries = queries_BQ.double()
        rows_BM = torch.empty(batch, 0, dtype=torch.int64, device=self._device)
        scores_BM = queries_BQ.new_empty(batch, 0)
        at_once = FLOAT64_ROWS[self._device.type]
        for first in range(0, self._rows, at_once):
            rows = torch.arange(first, min(first + at_once, self._rows), device=self._device)
            # Removed rows may have no exact key.
            rows = self._barred.eligible(rows.unsqueeze(0), None)[0]
            rows = rows[rows >= 0]
            keys = self._exact(rows)[: len(rows)]
            rows_BC = self._barred.eligible(rows.expand(batch, -1), excluded_B)
            scores_BC = (queries @ keys.double().T).float()
            scores_BC.masked_fill_(rows_BC < 0, NEGATIVE_INFINITY)
            rows_BM = torch.cat([rows_BM, rows_BC], dim=1)
            scores_BM = torch.cat([scores_BM, scores_BC], dim=1)
            rows_BM, scores_BM = self._first(rows_BM, scores_BM, wanted)
        return rows_BM

    def _first(self, rows_BM: Tensor, scores_BM: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """The `wanted` best in order, ties to the lower id; sorts only what may be among them."""
        if wanted < scores_BM.shape[1]:
            least_B1 = scores_BM.topk(wanted, dim=1).values[:, -1:]
            most = int((~(scores_BM < least_B1)).sum(dim=1).max())  # NaN is first
            # `topk` breaks ties as it likes, but all that reach the least score are among so many.
            kept_BM = scores_BM.topk(most, dim=1).indices
            rows_BM, scores_BM = rows_BM.gather(1, kept_BM), scores_BM.gather(1, kept_BM)
        ids_BM = self._ids_N[rows_BM.clamp(min=0)].masked_fill(rows_BM < 0, -1)
        order_BM = order_hits(scores_BM, ids_BM)[:, :wanted]
        return rows_BM.gather(1, order_BM), scores_BM.gather(1, order_BM)


def exact_inner_products(queries_BQ: Tensor, keys_BMQ: Tensor) -> Tensor:
    """Inner products whose value does not depend on where they are computed, float32 [B, M].

    Products of two float32 are exact in float64; they are added by halving, elementwise, so that
    the order of the additions depends on Q alone.
    """
    if keys_BMQ.device.type == "cpu":
        # By numpy: torch would wake other threads for each of these short steps.
        terms = keys_BMQ.detach().numpy().astype(np.float64)
        terms *= queries_BQ.detach().numpy().astype(np.float64)[:, None]
        return torch.from_numpy(_halved(terms)[..., 0].astype(np.float32))
    return _halved(keys_BMQ.double() * queries_BQ.double().unsqueeze(1))[..., 0].float()


def _halved(terms: Terms) -> Terms:
    """The sums over the last dimension, which is 1 then; the terms are overwritten."""
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        terms[..., : terms.shape[-1] - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms
