"""What must not win: removed rows and excluded documents, as cells of a block of scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PAIRS = 1 << 20  # masked cells named one by one; beyond, whole blocks are compared
NEGATIVE_INFINITY = float("-inf")


class DocumentRows:
    """Which rows belong to a document. Rows in the order of their documents cost nothing."""

    def __init__(self, doc_ids_N: Tensor) -> None:
        in_order = bool((doc_ids_N[1:] >= doc_ids_N[:-1]).all())
        self.doc_ids_N = doc_ids_N
        self._order = None if in_order else doc_ids_N.argsort(stable=True)
        self._sorted_N = doc_ids_N if self._order is None else doc_ids_N[self._order]

    @property
    def bytes(self) -> int:
        return 0 if self._order is None else self._order.nbytes + self._sorted_N.nbytes

    def ranges(self, documents_B: Tensor) -> tuple[Tensor, Tensor]:
        """[low, high) of each document's rows, int64 [B] each, to be mapped by `rows`."""
        low_B = torch.searchsorted(self._sorted_N, documents_B)
        return low_B, torch.searchsorted(self._sorted_N, documents_B, right=True)

    def rows(self, positions: Tensor) -> Tensor:
        return positions if self._order is None else self._order[positions]


@dataclass(frozen=True, kw_only=True)
class MaskedCells:
    """Cells of a block of queries' scores that cannot win, in the order of their rows.

    `pair_queries` and `pair_rows` name single cells; `documents` masks whole blocks instead, when
    the excluded documents are so long that single cells would be many.
    """

    dead_rows: Tensor
    pair_queries: Tensor
    pair_rows: Tensor
    documents: Tensor | None
    doc_ids: Tensor

    def cuts(self, edges: Sequence[int]) -> list["PieceCells"]:
        """The cells of each of the pieces [edges[i], edges[i + 1])."""
        at = torch.tensor(edges, device=self.dead_rows.device)
        dead = torch.searchsorted(self.dead_rows, at).tolist()
        pairs = torch.searchsorted(self.pair_rows, at).tolist()
        return [
            PieceCells(
                first=edges[i],
                rows=self.dead_rows[dead[i] : dead[i + 1]],
                pair_queries=self.pair_queries[pairs[i] : pairs[i + 1]],
                pair_rows=self.pair_rows[pairs[i] : pairs[i + 1]],
                documents=self.documents,
                doc_ids=None if self.documents is None else self.doc_ids[edges[i] : edges[i + 1]],
            )
            for i in range(len(edges) - 1)
        ]

    @property
    def none(self) -> bool:
        return not (len(self.dead_rows) or len(self.pair_rows)) and self.documents is None


@dataclass(frozen=True, kw_only=True)
class PieceCells:
    """The cells of one piece of the rows, which begins with row `first`."""

    first: int
    rows: Tensor
    pair_queries: Tensor
    pair_rows: Tensor
    documents: Tensor | None
    doc_ids: Tensor | None

    def apply(self, scores_nB: Tensor) -> None:
        """Put -inf where nothing may win."""
        if len(self.rows):
            scores_nB.index_fill_(0, self.rows - self.first, NEGATIVE_INFINITY)
        if len(self.pair_rows):
            cells = (self.pair_rows - self.first, self.pair_queries)
            scores_nB.index_put_(cells, scores_nB.new_tensor(NEGATIVE_INFINITY))
        if self.documents is not None and self.doc_ids is not None:
            excluded_nB = self.doc_ids.unsqueeze(1) == self.documents
            scores_nB.masked_fill_(excluded_nB, NEGATIVE_INFINITY)


def masked_cells(
    dead_rows: Tensor, document_rows: DocumentRows, excluded_B: Tensor | None
) -> MaskedCells:
    """The cells that removed rows, and each query's excluded document (-1: none), rule out."""
    device = dead_rows.device
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    pair_queries, pair_rows, documents = nothing, nothing, None
    if excluded_B is not None:
        low_B, high_B = document_rows.ranges(excluded_B)
        counts_B = high_B - low_B
        total = int(counts_B.sum())
        if total > MOST_PAIRS:
            documents = excluded_B
        elif total:
            batch = torch.arange(len(excluded_B), device=device)
            pair_queries = batch.repeat_interleave(counts_B)
            before_B = counts_B.cumsum(0) - counts_B
            inside = torch.arange(total, device=device) - before_B[pair_queries]
            pair_rows, order = document_rows.rows(low_B[pair_queries] + inside).sort()
            pair_queries = pair_queries[order]
    return MaskedCells(
        dead_rows=dead_rows,
        pair_queries=pair_queries,
        pair_rows=pair_rows,
        documents=documents,
        doc_ids=document_rows.doc_ids_N,
    )


class BarredRows:
    """What of an index's rows may not win: the removed ones, and a query's excluded document."""

    def __init__(self, doc_ids_N: Tensor, dead_rows: Tensor) -> None:
        self.doc_ids_N = doc_ids_N
        self._dead_rows = dead_rows
        self._documents = DocumentRows(doc_ids_N)
        self._is_dead_N = torch.zeros(len(doc_ids_N), dtype=torch.bool, device=doc_ids_N.device)
        self._is_dead_N[dead_rows] = True

    @property
    def bytes(self) -> int:
        return self._is_dead_N.nbytes + self._dead_rows.nbytes + self._documents.bytes

    def cells(self, excluded_B: Tensor | None) -> MaskedCells:
        """The same as cells of a block of scores."""
        return masked_cells(self._dead_rows, self._documents, excluded_B)

    def eligible(self, rows_BM: Tensor, excluded_B: Tensor | None) -> Tensor:
        """The rows, int64 [B, M], -1 where one must not win."""
        if excluded_B is None and not len(self._dead_rows):
            return rows_BM
        safe_BM = rows_BM.clamp(min=0)
        allowed_BM = ~self._is_dead_N[safe_BM]
        if excluded_B is not None:
            allowed_BM &= self.doc_ids_N[safe_BM] != excluded_B.unsqueeze(1)
        return rows_BM.masked_fill(~allowed_BM, -1)
