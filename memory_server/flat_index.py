"""Exact inner-product search by torch, on CPU or GPU, without ever holding the B x N score matrix.

The product is made block by block; of every 64 rows the best score tells whether the group can
hold a winner, and only the few best groups of a span are looked at row by row. What float32 says
there only *proposes*: winners are scored again in float64 by a sum whose order is fixed, so a score
depends on nothing but the query and the key: not on the block, the number of shards, the threads or
the device. A bound on float32's rounding then certifies that no other row can be among the winners;
a query that cannot be certified (many equal keys, say) is searched in float64 throughout.
"""

import torch
from torch import Tensor

from memory_server.index import Hits, IndexInput
from memory_server.masked_cells import NEGATIVE_INFINITY, DocumentRows, masked_cells
from memory_server.merge import order_hits

GROUP_ROWS = 64
EXTRA_GROUPS = 4  # beyond k: room for the certificate to succeed
EXTRA_ROWS = 8
QUERY_BLOCK = 256
BLOCK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 25}  # scores of one product: cache-sized, launch-sized
SPAN_SCORES = {"cpu": 1 << 22, "cuda": 1 << 28}  # scores held until their best are taken
EXACT_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class FlatIndex:
    """Exact top-k over float32 keys."""

    def __init__(self, rows: IndexInput) -> None:
        """Take the rows as they are."""
        self._keys_NQ = rows.keys.gather(torch.arange(rows.keys.rows, device=rows.keys.device))
        self._ids_N = rows.ids_N
        self._doc_ids_N = rows.doc_ids_N
        self._dead_rows = rows.dead_rows
        self._rows = rows.keys.rows
        self._device = rows.keys.device
        self._documents = DocumentRows(rows.doc_ids_N)
        self._is_dead_N = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        self._is_dead_N[rows.dead_rows] = True
        self._largest_norm = rows.keys.largest_norm

    @property
    def bytes(self) -> int:
        return self._is_dead_N.nbytes + self._dead_rows.nbytes + self._documents.bytes

    @torch.no_grad()
    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids_B: Tensor | None,
        *,
        exact: bool = False,
    ) -> Hits:
        """Return exactly k columns; see `memory_server.index.Index.search`."""
        blocks = []
        for start in range(0, queries_BQ.shape[0], QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            excluded = None if exclude_doc_ids_B is None else exclude_doc_ids_B[block]
            blocks.append(self._search_block(queries_BQ[block], k, excluded))
        if not blocks:
            empty = torch.empty(0, k, device=self._device)
            return Hits(rows=empty.long(), scores=empty)
        return Hits(
            rows=torch.cat([rows for rows, _ in blocks]),
            scores=torch.cat([scores for _, scores in blocks]),
        )

    def _search_block(
        self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = queries_BQ.shape[0]
        rows_Bk = torch.full((batch, k), -1, dtype=torch.int64, device=self._device)
        scores_Bk = torch.full((batch, k), NEGATIVE_INFINITY, device=self._device)
        found = min(k, self._rows)
        if not found:
            return rows_Bk, scores_Bk
        rows_BM, rest_B = self._propose(queries_BQ, found, excluded_B)
        rows_BK, scores_BK = self._best(queries_BQ, rows_BM, found)
        bound_B = self._rounding_bound(queries_BQ)
        certain_B = (rest_B == NEGATIVE_INFINITY) | (rest_B + 2 * bound_B < scores_BK[:, -1])
        doubtful = (~certain_B).nonzero().squeeze(1)
        if len(doubtful):
            excluded = None if excluded_B is None else excluded_B[doubtful]
            rows_BM = self._search_in_float64(queries_BQ[doubtful], found, excluded)
            rows_BK[doubtful], scores_BK[doubtful] = self._best(
                queries_BQ[doubtful], rows_BM, found
            )
        rows_Bk[:, :found] = rows_BK
        scores_Bk[:, :found] = scores_BK
        return rows_Bk, scores_Bk

    def _rounding_bound(self, queries_BQ: Tensor) -> Tensor:
        """How far a float32 inner product can be from the true one, in any order: Q·u·|q|·|k|."""
        exact = (
            torch.get_float32_matmul_precision() == "highest"
            if self._device.type == "cpu"
            else not torch.backends.cuda.matmul.allow_tf32
        )
        unit = 2.0**-24 if exact else 2.0**-8  # TF32 and bfloat16 round the operands
        width = queries_BQ.shape[1]
        norms_B: Tensor = torch.linalg.vector_norm(queries_BQ, dim=1)
        return norms_B * (width * unit * self._largest_norm)

    def _propose(
        self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows that may win, and the best float32 score of all rows that are not among them.

        Returns:
            (rows_BM int64, -1 for a row that may not win; rest_B float32, -inf if none is left)
        """
        batch = queries_BQ.shape[0]
        masked = masked_cells(self._dead_rows, self._documents, excluded_B)
        block = self._block_rows(batch)
        span = max(1, SPAN_SCORES[self._device.type] // (batch * block)) * block
        span = min(span, -(-self._rows // block) * block)
        scores = queries_BQ.new_empty(batch, span)
        maxima = queries_BQ.new_empty(batch, span // GROUP_ROWS)
        best_BM = queries_BQ.new_empty(batch, 0)
        rows_BM = torch.empty(batch, 0, dtype=torch.int64, device=self._device)
        rest_B = queries_BQ.new_full((batch,), NEGATIVE_INFINITY)
        for first in range(0, self._rows, span):
            last = min(first + span, self._rows)
            for start in range(first, last, block):
                stop = min(start + block, last)
                product = self._score_block(queries_BQ, start, stop, scores[:, start - first :])
                masked.apply(product, start, stop - start)
                at, groups = (start - first) // GROUP_ROWS, product.shape[1] // GROUP_ROWS
                grouped = product.view(batch, groups, GROUP_ROWS)
                torch.amax(grouped, dim=2, out=maxima[:, at : at + groups])
            count = -(-(last - first) // GROUP_ROWS)
            chosen_BG, left_B = _top(maxima[:, :count], k + EXTRA_GROUPS)
            inside = torch.arange(GROUP_ROWS, device=self._device)
            near_BM = (chosen_BG.unsqueeze(2) * GROUP_ROWS + inside).flatten(1)
            best_BM = torch.cat([best_BM, scores.gather(1, near_BM)], dim=1)
            rows_BM = torch.cat([rows_BM, near_BM + first], dim=1)
            kept_BM, dropped_B = _top(best_BM, k + EXTRA_ROWS)
            best_BM, rows_BM = best_BM.gather(1, kept_BM), rows_BM.gather(1, kept_BM)
            rest_B = torch.maximum(rest_B, torch.maximum(left_B, dropped_B))
        return rows_BM.masked_fill(best_BM == NEGATIVE_INFINITY, -1), rest_B

    def _score_block(self, queries_BQ: Tensor, start: int, stop: int, scores_BC: Tensor) -> Tensor:
        """Products with rows [start, stop) in the first columns, -inf up to a whole group."""
        count = stop - start
        whole = -(-count // GROUP_ROWS) * GROUP_ROWS
        torch.mm(queries_BQ, self._keys_NQ[start:stop].T, out=scores_BC[:, :count])
        scores_BC[:, count:whole] = NEGATIVE_INFINITY
        return scores_BC[:, :whole]

    def _block_rows(self, batch: int) -> int:
        """Rows of one product: whole groups, so that the scores stay in the cache."""
        groups = BLOCK_SCORES[self._device.type] // (batch * GROUP_ROWS)
        return max(16, min(groups, 256 if self._device.type == "cpu" else 1 << 14)) * GROUP_ROWS

    def _eligible(self, rows_BM: Tensor, excluded_B: Tensor | None) -> Tensor:
        """The rows, -1 where one does not exist, is dead or of an excluded document."""
        safe_BM = rows_BM.clamp(max=self._rows - 1)
        allowed_BM = (rows_BM < self._rows) & ~self._is_dead_N[safe_BM]
        if excluded_B is not None:
            allowed_BM &= self._doc_ids_N[safe_BM] != excluded_B.unsqueeze(1)
        return rows_BM.masked_fill(~allowed_BM, -1)

    def _best(self, queries_BQ: Tensor, rows_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        safe_BM = rows_BM.clamp(min=0)
        at_once = max(1, EXACT_BYTES[self._device.type] // (rows_BM.shape[1] * 8 * 128))
        scores_BM = torch.cat(
            [
                exact_inner_products(queries, self._keys_NQ[rows])
                for rows, queries in zip(
                    _parts(safe_BM, at_once), _parts(queries_BQ, at_once), strict=True
                )
            ]
        )
        scores_BM.masked_fill_(rows_BM < 0, NEGATIVE_INFINITY)
        ids_BM = self._ids_N[safe_BM].masked_fill(rows_BM < 0, -1)
        order_BK = order_hits(scores_BM, ids_BM)[:, :k]
        return rows_BM.gather(1, order_BK), scores_BM.gather(1, order_BK)

    def _search_in_float64(self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None) -> Tensor:
        """The k best rows (and EXTRA_ROWS more), by a product in float64; int64, -1 pads."""
        batch, wanted = queries_BQ.shape[0], k + EXTRA_ROWS
        queries = queries_BQ.double()
        rows_BM = torch.empty(batch, 0, dtype=torch.int64, device=self._device)
        scores_BM = queries_BQ.new_empty(batch, 0)
        block = self._block_rows(batch)
        for start in range(0, self._rows, block):
            keys = self._keys_NQ[start : start + block]
            rows = torch.arange(start, start + keys.shape[0], device=self._device)
            rows_BC = self._eligible(rows.expand(batch, -1), excluded_B)
            scores_BC = (queries @ keys.double().T).float()
            scores_BC.masked_fill_(rows_BC < 0, NEGATIVE_INFINITY)
            rows_BM = torch.cat([rows_BM, rows_BC], dim=1)
            scores_BM = torch.cat([scores_BM, scores_BC], dim=1)
            ids_BM = self._ids_N[rows_BM.clamp(min=0)].masked_fill(rows_BM < 0, -1)
            order_BM = order_hits(scores_BM, ids_BM)[:, :wanted]
            rows_BM, scores_BM = rows_BM.gather(1, order_BM), scores_BM.gather(1, order_BM)
        return rows_BM


def exact_inner_products(queries_BQ: Tensor, keys_BMQ: Tensor) -> Tensor:
    """Inner products whose value does not depend on where they are computed, float32 [B, M].

    Products of two float32 are exact in float64; they are added by halving, elementwise, so that
    the order of the additions depends on Q alone.
    """
    terms = keys_BMQ.double() * queries_BQ.double().unsqueeze(1)
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        folded = terms[..., :half].clone()
        folded[..., : terms.shape[-1] - half] += terms[..., half:]
        terms = folded
    return terms.squeeze(-1).float()


def _top(values_BM: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Positions of the `wanted` highest values, int64, and the highest of the other values."""
    if values_BM.shape[1] <= wanted:
        everything = torch.arange(values_BM.shape[1], device=values_BM.device)
        nothing_B = values_BM.new_full((values_BM.shape[0],), NEGATIVE_INFINITY)
        return everything.expand(values_BM.shape[0], -1), nothing_B
    top = values_BM.topk(wanted + 1, dim=1)
    return top.indices[:, :wanted], top.values[:, wanted]


def _parts(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]
