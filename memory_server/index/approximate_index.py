"""The approximate index that a shard serves: FAISS for large blocks, exact search for the rest.

FAISS only proposes: winners are scored by their exact keys, as everywhere. While the gate is
closed every answer is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memory_server.index.base import ExactKeys, Hits, IndexInput
from memory_server.index.faiss_index import FaissBlock
from memory_server.index.faiss_presets import Recipe
from memory_server.index.flat_index import FlatIndex, exact_inner_products
from memory_server.index.masked_cells import NEGATIVE_INFINITY
from memory_server.index.merge import order_hits
from memory_server.index.recall_gate import RecallGate
from memory_server.keys.key_blocks import BlockedKeys, BlockView

EXTRA_ROWS = 16  # beyond 2k: scored in float64, so that float32's rounding decides nothing
EXTRA_EXCLUDED = 16  # a document has a few entries; more are asked for again
MOST_TRIES = 3
TRY_FACTOR = 4
GATHER_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # on a CPU what the allocator reuses at once


@dataclass(frozen=True, kw_only=True)
class AcceleratedView:
    """Rows of an epoch that FAISS searches.

    Attributes:
        allowed_n: bool, the block's rows that may be returned; None: all of them.
        selection: the same as FAISS takes it; None where it takes none, or all rows are allowed.
    """

    view: BlockView
    accelerator: FaissBlock
    recipe: Recipe
    allowed_n: Tensor | None
    selection: Any
    live_rows: int


class ApproximateIndex:
    """Top-k over one epoch's keys, approximate while its gate is open. Only the gate changes."""

    def __init__(
        self,
        rows: IndexInput,
        accelerated: Sequence[tuple[BlockView, FaissBlock, Recipe]],
        gate: RecallGate,
    ) -> None:
        """`accelerated`: views of `rows.keys`; the other views are searched exactly."""
        self.gate = gate
        self._rows = rows
        self._device = rows.keys.device
        self._flat = FlatIndex(rows)
        self._is_dead_N = torch.zeros(rows.keys.rows, dtype=torch.bool, device=self._device)
        self._is_dead_N[rows.dead_rows] = True
        self.parts = tuple(self._part(*one) for one in accelerated)
        fast = {part.view.offset for part in self.parts}
        rest = [view for view in rows.keys.views if view.offset not in fast and view.rows]
        self._rest_rows, self._rest = _rest_of(rows, rest, self._is_dead_N)

    @property
    def accelerated_rows(self) -> int:
        """Rows that FAISS searches; the others are always searched exactly."""
        return sum(part.view.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """With all that FAISS holds, also what it shares with other epochs."""
        shared = {id(part.accelerator): part.accelerator.bytes for part in self.parts}
        masks = [part.allowed_n for part in self.parts if part.allowed_n is not None]
        mine = self._is_dead_N.nbytes + sum(mask.nbytes + len(mask) // 8 for mask in masks)
        rest = self._rest.bytes + 3 * self._rest_rows.nbytes
        return self._flat.bytes + rest + mine + sum(shared.values())

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids_B: Tensor | None,
        *,
        exact: bool = False,
    ) -> Hits:
        """Return exactly k columns; see `memory_server.index.base.Index.search`."""
        if exact or not self.parts or not self.gate.state.open:
            return self._flat.search(queries_BQ, k, exclude_doc_ids_B, exact=exact)
        return self.search_approximately(queries_BQ, k, exclude_doc_ids_B)

    @torch.no_grad()
    def search_approximately(
        self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        """As `search` with an open gate. K entries come back whenever K exist: a query for which
        FAISS found too few is searched exactly."""
        if not self.parts or not len(queries_BQ):
            return self._flat.search(queries_BQ, k, exclude_doc_ids_B, exact=True)
        short_B = torch.zeros(len(queries_BQ), dtype=torch.bool, device=self._device)
        found = []
        for part in self.parts:
            rows_BM, lacking_B = self._candidates(part, queries_BQ, k, exclude_doc_ids_B)
            found.append(self._most_promising(queries_BQ, rows_BM, 2 * k + EXTRA_ROWS))
            short_B |= lacking_B
        if len(self._rest_rows):
            rows_Bk = self._rest.search(queries_BQ, k, exclude_doc_ids_B).rows
            found.append(self._rest_rows[rows_Bk.clamp(min=0)].masked_fill(rows_Bk < 0, -1))
        rows_BK, scores_BK = self._best(queries_BQ, torch.cat(found, dim=1), k)
        again = short_B.nonzero().squeeze(1)
        if len(again):
            excluded = None if exclude_doc_ids_B is None else exclude_doc_ids_B[again]
            hits = self._flat.search(queries_BQ[again], k, excluded, exact=True)
            rows_BK[again], scores_BK[again] = hits.rows, hits.scores
        return Hits(rows=rows_BK, scores=scores_BK, exact=False)

    def _part(self, view: BlockView, accelerator: FaissBlock, recipe: Recipe) -> AcceleratedView:
        dead = self._is_dead_N[view.offset : view.offset + view.rows]
        live_rows = view.rows - int(dead.sum())
        allowed_n, selection = None, None
        if live_rows < view.block.rows:
            allowed_n = torch.zeros(view.block.rows, dtype=torch.bool, device=self._device)
            allowed_n[view.start : view.stop] = ~dead
            if accelerator.takes_selection:
                selection = accelerator.selection(allowed_n)
        return AcceleratedView(
            view=view,
            accelerator=accelerator,
            recipe=recipe,
            allowed_n=allowed_n,
            selection=selection,
            live_rows=live_rows,
        )

    def _candidates(
        self, part: AcceleratedView, queries_BQ: Tensor, k: int, excluded_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What FAISS proposes of one view, and for which queries that is too little.

        Returns:
            (rows_BM int64, rows of the epoch that may be returned, -1 pads; lacking_B bool)
        """
        most = part.accelerator.most_candidates
        wanted = min(part.recipe.candidates(k), most)
        enough = min(k, part.live_rows)
        count = wanted + (0 if excluded_B is None else EXTRA_EXCLUDED)
        if part.allowed_n is not None and part.selection is None:  # removed rows come back, too
            enough = min(wanted, part.live_rows)
            count = count * part.view.block.rows // max(1, part.live_rows)
            count = min(count, TRY_FACTOR * wanted) + EXTRA_ROWS
        count = min(count, most)
        rows_BM = self._eligible(part, queries_BQ, count, excluded_B)
        lacking_B = (rows_BM >= 0).sum(1) < enough
        for _ in range(MOST_TRIES - 1):
            again = lacking_B.nonzero().squeeze(1)
            if not len(again) or count >= most:
                break
            count = min(count * TRY_FACTOR, most)
            excluded = None if excluded_B is None else excluded_B[again]
            rows = self._eligible(part, queries_BQ[again], count, excluded)
            rows_BM = torch.nn.functional.pad(rows_BM, (0, count - rows_BM.shape[1]), value=-1)
            rows_BM[again] = rows
            lacking_B[again] = (rows >= 0).sum(1) < enough
        return rows_BM, lacking_B

    def _eligible(
        self, part: AcceleratedView, queries_BQ: Tensor, count: int, excluded_B: Tensor | None
    ) -> Tensor:
        """What FAISS finds, as rows of the epoch, without what may not be returned."""
        inside_BM = part.accelerator.search(queries_BQ, count, part.selection)
        out_BM = inside_BM < 0
        if part.allowed_n is not None and part.selection is None:
            out_BM |= ~part.allowed_n[inside_BM.clamp(min=0)]
        rows_BM = (inside_BM + (part.view.offset - part.view.start)).masked_fill(out_BM, -1)
        if excluded_B is not None:
            documents_BM = self._rows.doc_ids_N[rows_BM.clamp(min=0)]
            rows_BM = rows_BM.masked_fill(documents_BM == excluded_B.unsqueeze(1), -1)
        return rows_BM

    def _most_promising(self, queries_BQ: Tensor, rows_BM: Tensor, wanted: int) -> Tensor:
        """The best of the rows by float32 products with what their codes stand for."""
        if rows_BM.shape[1] <= 2 * wanted:
            return rows_BM
        few = self._queries_at_once(rows_BM)
        best = []
        for rows, queries in zip(rows_BM.split(few), queries_BQ.split(few), strict=True):
            keys = self._rows.keys.gather(rows.clamp(min=0))
            scores = torch.bmm(keys, queries.unsqueeze(2)).squeeze(2)
            scores.masked_fill_(rows < 0, NEGATIVE_INFINITY)
            best.append(rows.gather(1, scores.topk(wanted, dim=1).indices))
        return torch.cat(best)

    def _best(self, queries_BQ: Tensor, rows_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows by their exact scores, ties to the lower id; -1 and -inf pad."""
        if rows_BM.shape[1] < k:
            rows_BM = torch.nn.functional.pad(rows_BM, (0, k - rows_BM.shape[1]), value=-1)
        few = self._queries_at_once(rows_BM)
        scores_BM = torch.cat(
            [
                exact_inner_products(queries, self._exact_keys(rows.clamp(min=0)))
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
        if self._rows.keys.exact:
            return self._rows.keys.gather(rows_BM)
        assert self._rows.exact_keys is not None
        unique, where = rows_BM.unique(return_inverse=True)
        return self._rows.exact_keys(unique.cpu().numpy()).to(self._device)[where]


def _rest_of(
    rows: IndexInput, views: Sequence[BlockView], is_dead_N: Tensor
) -> tuple[Tensor, FlatIndex]:
    """The rows of these views, int64, and an exact index over them alone."""
    device = rows.keys.device
    of_views = [torch.arange(v.offset, v.offset + v.rows, device=device) for v in views]
    chosen = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *of_views])
    exact_keys: ExactKeys | None = None
    if rows.exact_keys is not None:
        exact_keys = _of_rows(rows.exact_keys, chosen)
    part = IndexInput(
        keys=BlockedKeys(
            [(view.block, view.start, view.stop) for view in views], rows.keys.width, device
        ),
        ids_N=rows.ids_N[chosen],
        doc_ids_N=rows.doc_ids_N[chosen],
        dead_rows=is_dead_N[chosen].nonzero().squeeze(1),
        exact_keys=exact_keys,
    )
    return chosen, FlatIndex(part)


def _of_rows(exact_keys: ExactKeys, chosen: Tensor) -> ExactKeys:
    at = chosen.cpu().numpy()
    return lambda rows: exact_keys(at[rows])
