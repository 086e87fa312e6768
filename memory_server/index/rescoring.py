"""Which of the proposed rows win: by float32 products first, the few best by their exact keys."""

import torch
from torch import Tensor

from memory_server.index.base import IndexInput
from memory_server.index.faiss_products import inner_products_at
from memory_server.index.flat_index import exact_inner_products
from memory_server.index.masked_cells import NEGATIVE_INFINITY
from memory_server.index.merge import order_hits
from memory_server.keys.key_blocks import BlockView

EXTRA_ROWS = 11  # beyond k: scored in float64, so that float32's rounding decides nothing
GATHER_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # on a CPU what the allocator reuses at once


class Rescorer:
    """Scores proposed rows of one epoch. Immutable."""

    def __init__(self, rows: IndexInput) -> None:
        self._rows = rows
        self._device = rows.keys.device

    def most_promising(
        self, queries_BQ: Tensor, rows_BM: Tensor, k: int, view: BlockView
    ) -> Tensor:
        """A few more than k of the rows, the best by products with what their codes stand for.

        Args:
            rows_BM: int64, of the epoch, all in this view; -1 for none.
        """
        wanted = k + EXTRA_ROWS
        if rows_BM.shape[1] <= wanted + EXTRA_ROWS:
            return rows_BM
        exact_nQ = view.block.codes.exact_numbers
        if exact_nQ is not None and exact_nQ.device.type == "cpu":
            inside_BM = (rows_BM + (view.start - view.offset)).masked_fill_(rows_BM < 0, -1)
            scores_BM = inner_products_at(queries_BQ, exact_nQ, inside_BM)
            return rows_BM.gather(1, scores_BM.topk(wanted, dim=1).indices)
        few = self._queries_at_once(rows_BM)
        best = []
        for rows, queries in zip(rows_BM.split(few), queries_BQ.split(few), strict=True):
            keys = self._rows.keys.gather(rows.clamp(min=0))
            scores = torch.bmm(keys, queries.unsqueeze(2)).squeeze(2)
            scores.masked_fill_(rows < 0, NEGATIVE_INFINITY)
            best.append(rows.gather(1, scores.topk(wanted, dim=1).indices))
        return torch.cat(best)

    def best(self, queries_BQ: Tensor, rows_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        if rows_BM.shape[1] < k:
            rows_BM = torch.nn.functional.pad(rows_BM, (0, k - rows_BM.shape[1]), value=-1)
        few = self._queries_at_once(rows_BM)
        scores_BM = torch.cat(
            [
                exact_inner_products(queries, self._exact_keys(rows))
                for rows, queries in zip(rows_BM.split(few), queries_BQ.split(few), strict=True)
            ]
        )
        scores_BM.masked_fill_(rows_BM < 0, NEGATIVE_INFINITY)
        ids_BM = self._rows.ids_N[rows_BM.clamp(min=0)].masked_fill(rows_BM < 0, -1)
        order_BK = order_hits(scores_BM, ids_BM)[:, :k]
        return rows_BM.gather(1, order_BK), scores_BM.gather(1, order_BK)

    def _queries_at_once(self, rows_BM: Tensor) -> int:
        numbers = rows_BM.shape[1] * self._rows.keys.width
        return max(1, GATHER_NUMBERS[self._device.type] // numbers)

    def _exact_keys(self, rows_BM: Tensor) -> Tensor:
        """Of rows, float32 [B,M,Q]; whatever for -1."""
        if self._rows.keys.exact:
            return self._rows.keys.gather(rows_BM.clamp(min=0))
        assert self._rows.exact_keys is not None
        # Padding asks for nothing: row 0 may be a removed one, which has no exact key.
        real_BM = rows_BM >= 0
        keys_BMQ = torch.zeros(*rows_BM.shape, self._rows.keys.width, device=self._device)
        unique, where = rows_BM[real_BM].unique(return_inverse=True)
        if len(unique):
            exact = self._rows.exact_keys(unique.cpu().numpy()).to(self._device)
            keys_BMQ[real_BM] = exact[where]
        return keys_BMQ
