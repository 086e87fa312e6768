"""Exact inner-product search by torch, on CPU or GPU, without ever holding the B x N score matrix.

Of every 32 rows the best score tells whether the group can hold a winner; only the rows of the few
best groups are scored one by one. What float32 says there only *proposes*: winners are scored again
in float64 by a sum whose order is fixed, so a score depends on nothing but the query and the key:
not on the block, the number of shards, the threads or the device. A bound on float32's rounding
then certifies that no other row can be among the winners; a query that cannot be certified (many
equal keys, say) is searched in float64 throughout.
"""

import torch
from torch import Tensor

from memory_server.index import Hits, IndexInput
from memory_server.masked_cells import NEGATIVE_INFINITY, DocumentRows, masked_cells
from memory_server.merge import order_hits
from memory_server.row_groups import GROUP_ROWS, RowGroups, top

EXTRA_GROUPS = 11  # beyond k: room for the certificate to succeed
EXTRA_ROWS = 11
QUERY_BLOCK = 512
CANDIDATE_SCORES = {"cpu": 1 << 23, "cuda": 1 << 28}
FLOAT64_ROWS = 4096
EXACT_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class FlatIndex:
    """Exact top-k over keys in blocks, which are used as they lie."""

    def __init__(self, rows: IndexInput) -> None:
        """Take the rows as they are."""
        self._keys = rows.keys
        self._groups = RowGroups(rows.keys)
        self._ids_N = rows.ids_N
        self._doc_ids_N = rows.doc_ids_N
        self._dead_rows = rows.dead_rows
        self._rows = rows.keys.rows
        self._device = rows.keys.device
        self._documents = DocumentRows(rows.doc_ids_N)
        self._is_dead_N = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        self._is_dead_N[rows.dead_rows] = True

    @property
    def bytes(self) -> int:
        mine = self._is_dead_N.nbytes + self._dead_rows.nbytes
        return mine + self._documents.bytes + self._groups.bytes

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
        scores_each = (k + EXTRA_GROUPS) * GROUP_ROWS
        at_once = min(QUERY_BLOCK, max(1, CANDIDATE_SCORES[self._device.type] // scores_each))
        blocks = []
        for start in range(0, queries_BQ.shape[0], at_once):
            block = slice(start, start + at_once)
            excluded = None if exclude_doc_ids_B is None else exclude_doc_ids_B[block]
            blocks.append(self._search_block(queries_BQ[block].contiguous(), k, excluded))
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
        bound_B = self._rounding_bound(queries_BQ)
        rows_BM, rest_B = self._propose(queries_BQ, found, excluded_B, bound_B)
        rows_BK, scores_BK = self._best(queries_BQ, rows_BM, found)
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
        return norms_B * (width * unit * self._keys.largest_norm)

    def _propose(
        self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None, bound_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows that may win, and the best score of all others that may.

        A group or row whose score is more than 4 bounds below the k-th best cannot win: 1 for
        either's product, and 1 for the rounding of either's final score.

        Returns:
            (rows_BM int64, -1 for a row that may not win; rest_B float32, -inf if none is left)
        """
        batch = queries_BQ.shape[0]
        masked = masked_cells(self._dead_rows, self._documents, excluded_B)
        groups_BW, best_BW, rest_B = self._groups.best(queries_BQ, k + EXTRA_GROUPS, masked)
        order_BW, hopeful_BW = _hopeful(best_BW, k, 4 * bound_B)
        groups_BW = groups_BW.gather(1, order_BW)[:, : hopeful_BW.shape[1]]
        of_queries_P = hopeful_BW.nonzero()[:, 0]
        groups_P = groups_BW[hopeful_BW]
        scores_PR = self._groups.scores(queries_BQ, of_queries_P, groups_P)
        rows_PR = self._groups.rows(groups_P)
        excluded_P = None if excluded_B is None else excluded_B[of_queries_P]
        if len(self._dead_rows) or excluded_P is not None:
            rows_PR = self._eligible(rows_PR, excluded_P)
        scores_PR.masked_fill_(rows_PR < 0, NEGATIVE_INFINITY)
        shape = (*groups_BW.shape, GROUP_ROWS)
        scores_BWR = scores_PR.new_full(shape, NEGATIVE_INFINITY)
        scores_BWR[hopeful_BW] = scores_PR
        rows_BWR = rows_PR.new_full(shape, -1)
        rows_BWR[hopeful_BW] = rows_PR
        scores_BM, rows_BM = scores_BWR.view(batch, -1), rows_BWR.view(batch, -1)
        kept_BM, dropped_B = top(scores_BM, k + EXTRA_ROWS)
        scores_BM, rows_BM = scores_BM.gather(1, kept_BM), rows_BM.gather(1, kept_BM)
        order_BM, hopeful_BM = _hopeful(scores_BM, k, 4 * bound_B)
        rows_BM = rows_BM.gather(1, order_BM)[:, : hopeful_BM.shape[1]]
        return rows_BM.masked_fill(~hopeful_BM, -1), torch.maximum(rest_B, dropped_B)

    def _eligible(self, rows_BM: Tensor, excluded_B: Tensor | None) -> Tensor:
        """The rows, -1 where one is dead or of an excluded document."""
        safe_BM = rows_BM.clamp(min=0)
        allowed_BM = ~self._is_dead_N[safe_BM]
        if excluded_B is not None:
            allowed_BM &= self._doc_ids_N[safe_BM] != excluded_B.unsqueeze(1)
        return rows_BM.masked_fill(~allowed_BM, -1)

    def _best(self, queries_BQ: Tensor, rows_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        if rows_BM.shape[1] < k:
            rows_BM = torch.nn.functional.pad(rows_BM, (0, k - rows_BM.shape[1]), value=-1)
        safe_BM = rows_BM.clamp(min=0)
        at_once = max(1, EXACT_BYTES[self._device.type] // (rows_BM.shape[1] * 8 * 128))
        scores_BM = torch.cat(
            [
                exact_inner_products(queries, self._keys.gather(rows))
                for rows, queries in zip(
                    safe_BM.split(at_once), queries_BQ.split(at_once), strict=True
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
        for first, last, codes, start in self._keys.pieces(FLOAT64_ROWS):
            rows = torch.arange(first, last, device=self._device)
            keys = codes.gather(rows + (start - first))
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


def _hopeful(scores_BM: Tensor, k: int, margin_B: Tensor) -> tuple[Tensor, Tensor]:
    """The order from the best to the worst, and which, in it, are within the margin of the k-th.

    Returns:
        (int64 [B, M]; bool [B, m], as many columns as any query needs, at least one). NaN is
        within every margin, -inf in none.
    """
    ordered = scores_BM.sort(dim=1, descending=True)
    hopeful_BM = ordered.values != NEGATIVE_INFINITY
    if k <= scores_BM.shape[1]:
        kth_B1 = ordered.values[:, k - 1 : k]
        hopeful_BM &= ~(ordered.values < kth_B1 - margin_B.unsqueeze(1))
    columns = max(1, int(hopeful_BM.sum(1).max()))
    return ordered.indices, hopeful_BM[:, :columns]
