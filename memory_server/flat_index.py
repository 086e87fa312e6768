"""Exact inner-product search by torch, on CPU or GPU, without ever holding the B x N score matrix.

Two levels. The first multiplies block by block and keeps, of every 64 rows, only the best score.
The second looks again at the few groups that can hold winners. What float32 says there only
*proposes*: winners are scored again in float64 by a sum whose order is fixed, so a score depends on
nothing but the query and the key: not on the block, the number of shards, the threads or the
device. A bound on float32's rounding then certifies that no other row can be among the winners; a
query that cannot be certified (many equal keys, say) is searched in float64 throughout.
"""

import torch
from torch import Tensor

from memory_server.index import Hits
from memory_server.masked_cells import NEGATIVE_INFINITY, DocumentRows, masked_cells
from memory_server.merge import order_hits

GROUP_ROWS = 64
EXTRA_GROUPS = 4  # beyond k: room for the certificate to succeed
EXTRA_ROWS = 8
QUERY_BLOCK = 256
GROUPS_AT_ONCE = 1 << 16  # group maxima held before they are thinned: 64 MiB for a block of queries
BLOCK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 25}  # scores of one product: cache-sized, launch-sized
RESCAN_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class FlatIndex:
    """Exact top-k over float32 keys."""

    def __init__(
        self, *, keys_NQ: Tensor, ids_N: Tensor, doc_ids_N: Tensor, dead_rows: Tensor
    ) -> None:
        """Take the rows as they are; nothing is copied but the order of the documents.

        Args:
            keys_NQ: float32, contiguous, finite.
            ids_N: int64, unique among rows that are not dead.
            doc_ids_N: int64.
            dead_rows: int64, ascending: rows that are never returned.
        """
        self._keys_NQ = keys_NQ
        self._ids_N = ids_N
        self._doc_ids_N = doc_ids_N
        self._dead_rows = dead_rows
        self._rows = keys_NQ.shape[0]
        self._device = keys_NQ.device
        self._documents = DocumentRows(doc_ids_N)
        self._is_dead_N = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        self._is_dead_N[dead_rows] = True
        norms = [torch.linalg.vector_norm(keys, dim=1).max() for keys in _parts(keys_NQ, 1 << 16)]
        self._largest_norm = float(torch.stack(norms).max()) if norms else 0.0

    @property
    def bytes(self) -> int:
        return self._is_dead_N.nbytes + self._dead_rows.nbytes + self._documents.bytes

    @torch.no_grad()
    def search(self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None) -> Hits:
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
        """How far a float32 inner product can be from the true one: Q·u·|q|·|k|, whatever the
        order."""
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
        groups_BG, rest_B = self._best_groups(queries_BQ, k + EXTRA_GROUPS, excluded_B)
        inside = torch.arange(GROUP_ROWS, device=self._device)
        rows_BM = (groups_BG.unsqueeze(2) * GROUP_ROWS + inside).flatten(1)
        rows_BM = self._eligible(rows_BM, excluded_B)
        per_query = rows_BM.shape[1] * queries_BQ.shape[1] * 4
        at_once = max(1, RESCAN_BYTES[self._device.type] // per_query)
        scores_BM = torch.cat(
            [
                torch.bmm(self._keys_NQ[rows.clamp(min=0)], queries.unsqueeze(2)).squeeze(2)
                for rows, queries in zip(
                    _parts(rows_BM, at_once), _parts(queries_BQ, at_once), strict=True
                )
            ]
        )
        scores_BM.masked_fill_(rows_BM < 0, NEGATIVE_INFINITY)
        kept = min(k + EXTRA_ROWS, scores_BM.shape[1])
        if kept < scores_BM.shape[1]:
            best = scores_BM.topk(kept + 1, dim=1)
            rest_B = torch.maximum(rest_B, best.values[:, -1])
            rows_BM = rows_BM.gather(1, best.indices[:, :kept])
        return rows_BM, rest_B

    def _best_groups(
        self, queries_BQ: Tensor, wanted: int, excluded_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The groups of 64 rows with the highest maxima, and the best maximum of the others."""
        batch = queries_BQ.shape[0]
        block = self._block_rows(batch)
        masked = masked_cells(self._dead_rows, self._documents, excluded_B)
        best_B, best_groups = queries_BQ.new_empty(batch, 0), queries_BQ.new_empty(batch, 0).long()
        rest_B = queries_BQ.new_full((batch,), NEGATIVE_INFINITY)
        scores = queries_BQ.new_empty(batch, block)
        span = max(block, GROUPS_AT_ONCE * GROUP_ROWS // block * block)
        for first in range(0, self._rows, span):
            last = min(first + span, self._rows)
            maxima_BG = queries_BQ.new_empty(batch, -(-(last - first) // GROUP_ROWS))
            for start in range(first, last, block):
                keys = self._keys_NQ[start : min(start + block, last)]
                count = keys.shape[0]
                whole = -(-count // GROUP_ROWS)
                torch.mm(queries_BQ, keys.T, out=scores[:, :count])
                product = scores[:, : whole * GROUP_ROWS]
                product[:, count:] = NEGATIVE_INFINITY
                masked.apply(product, start, count)
                at = (start - first) // GROUP_ROWS
                torch.amax(
                    product.view(batch, whole, GROUP_ROWS), dim=2, out=maxima_BG[:, at : at + whole]
                )
            groups = torch.arange(maxima_BG.shape[1], device=self._device) + first // GROUP_ROWS
            maxima_BG = torch.cat([best_B, maxima_BG], dim=1)
            groups_BG = torch.cat([best_groups, groups.expand(batch, -1)], dim=1)
            kept = min(wanted, maxima_BG.shape[1])
            if kept < maxima_BG.shape[1]:
                top = maxima_BG.topk(kept + 1, dim=1)
                rest_B = torch.maximum(rest_B, top.values[:, -1])
                best_B = top.values[:, :kept]
                best_groups = groups_BG.gather(1, top.indices[:, :kept])
            else:
                best_B, best_groups = maxima_BG, groups_BG
        return best_groups, rest_B

    def _block_rows(self, batch: int) -> int:
        """Rows of one product: whole groups, so that the scores stay in the cache."""
        groups = BLOCK_SCORES[self._device.type] // (batch * GROUP_ROWS)
        return max(16, min(groups, 256 if self._device.type == "cpu" else 1 << 14)) * GROUP_ROWS

    def _eligible(self, rows_BM: Tensor, excluded_B: Tensor | None) -> Tensor:
        """The rows, with -1 where a row does not exist, is dead or belongs to an excluded
        document."""
        safe_BM = rows_BM.clamp(max=self._rows - 1)
        allowed_BM = (rows_BM < self._rows) & ~self._is_dead_N[safe_BM]
        if excluded_B is not None:
            allowed_BM &= self._doc_ids_N[safe_BM] != excluded_B.unsqueeze(1)
        return rows_BM.masked_fill(~allowed_BM, -1)

    def _best(self, queries_BQ: Tensor, rows_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        safe_BM = rows_BM.clamp(min=0)
        at_once = max(1, RESCAN_BYTES[self._device.type] // (rows_BM.shape[1] * 8 * 128))
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


def _parts(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]
