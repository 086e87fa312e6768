"""The approximate index that a shard serves: FAISS for large blocks, exact search for the rest.

FAISS only proposes: winners are scored by their exact keys, as everywhere. While the gate is
closed every answer is exact. How much FAISS looks at is the least that finds enough for the
searches' own queries, unless the user said it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memory_server.index.base import ExactKeys, Hits, IndexInput, RecentQueries
from memory_server.index.faiss_index import FaissBlock
from memory_server.index.faiss_presets import Recipe
from memory_server.index.flat_index import FlatIndex
from memory_server.index.recall_audit import Rest, found_rows
from memory_server.index.recall_gate import MIN_QUERIES, RecallGate
from memory_server.index.rescoring import Rescorer
from memory_server.index.search_effort import (
    Effort,
    Recall,
    aim_for,
    least_effort,
    tuning_and_judging,
)
from memory_server.keys.key_blocks import BlockedKeys, BlockView

EXTRA_ROWS = 16  # for removed rows where FAISS does not leave them out
EXTRA_EXCLUDED = 16  # a document has a few entries; more are asked for again
MOST_TRIES = 3
TRY_FACTOR = 4


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

    def cost(self, effort: Effort, k: int) -> float:
        """What an effort takes here; to compare efforts by."""
        return self.recipe.cost(effort, rows=self.view.block.rows, k=k)


class ApproximateIndex:
    """Top-k over one epoch's keys, approximate while its gate is open.

    Only the gate and the effort change.
    """

    def __init__(
        self,
        rows: IndexInput,
        accelerated: Sequence[tuple[BlockView, FaissBlock, Recipe]],
        gate: RecallGate,
        effort: Effort | None = None,
    ) -> None:
        """Take what is built.

        Args:
            accelerated: views of `rows.keys`; the other views are searched exactly.
            effort: that was measured on an index like this one; None: as the recipes begin.
        """
        self.gate = gate
        self._rows = rows
        self._device = rows.keys.device
        self._flat = FlatIndex(rows)
        self._rescorer = Rescorer(rows)
        self._is_dead_N = torch.zeros(rows.keys.rows, dtype=torch.bool, device=self._device)
        self._is_dead_N[rows.dead_rows] = True
        self.parts = tuple(self._part(*one) for one in accelerated)
        fast = {part.view.offset for part in self.parts}
        rest = [view for view in rows.keys.views if view.offset not in fast and view.rows]
        self._rest_rows, self._rest = _rest_of(rows, rest, self._is_dead_N)
        self._begins_with, self._most = _efforts([part.recipe for part in self.parts])
        self.effort = effort or self._begins_with

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

    def search_approximately(
        self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        """As `search` with an open gate. K entries come back whenever K exist: a query for which
        FAISS found too few is searched exactly."""
        return self._search_with(self.effort, queries_BQ, k, exclude_doc_ids_B)

    def search_every_key(
        self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        """As `search` with a closed gate; see `GatedIndex.search_every_key`."""
        return self._flat.search(queries_BQ, k, exclude_doc_ids_B)

    def tune(self, recent: RecentQueries, rest: Rest | None = None) -> RecentQueries:
        """Choose the effort by some of these queries; see `GatedIndex.tune`."""
        if self._most is None:
            return recent.sample(MIN_QUERIES)
        by, others = tuning_and_judging(recent)
        true_rows = found_rows(self.search_every_key, by, device=self._device, rest=rest)

        def measure(effort: Effort) -> Recall:
            search = partial(self._search_with, effort)
            return Recall.of(found_rows(search, by, device=self._device, rest=rest), true_rows)

        self.effort = least_effort(
            measure,
            most=self._most,
            aim=aim_for(self.gate.min_recall),
            cost=lambda effort: sum(part.cost(effort, recent.k) for part in self.parts),
        )
        return others

    def describe(self) -> str:
        """What a search looks at, if that was measured; else nothing."""
        return "" if self._most is None else self.effort.describe()

    @torch.no_grad()
    def _search_with(
        self, effort: Effort, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None
    ) -> Hits:
        if not self.parts or not len(queries_BQ):
            return self._flat.search(queries_BQ, k, exclude_doc_ids_B, exact=True)
        short_B = torch.zeros(len(queries_BQ), dtype=torch.bool, device=self._device)
        found = []
        for part in self.parts:
            rows_BM, lacking_B = self._candidates(part, effort, queries_BQ, k, exclude_doc_ids_B)
            found.append(self._rescorer.most_promising(queries_BQ, rows_BM, k, part.view))
            short_B |= lacking_B
        if len(self._rest_rows):
            rows_Bk = self._rest.search(queries_BQ, k, exclude_doc_ids_B).rows
            found.append(self._rest_rows[rows_Bk.clamp(min=0)].masked_fill(rows_Bk < 0, -1))
        rows_BK, scores_BK = self._rescorer.best(queries_BQ, torch.cat(found, dim=1), k)
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
        self,
        part: AcceleratedView,
        effort: Effort,
        queries_BQ: Tensor,
        k: int,
        excluded_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What FAISS proposes of one view, and for which queries that is too little.

        Returns:
            (rows_BM int64, rows of the epoch that may be returned, -1 pads; lacking_B bool)
        """
        most = part.accelerator.most_candidates
        lists = effort.lists
        wanted = min(part.recipe.candidates(k, effort), most)
        enough = min(k, part.live_rows)
        count = wanted + (0 if excluded_B is None else EXTRA_EXCLUDED)
        if part.allowed_n is not None and part.selection is None:  # removed rows come back, too
            enough = min(wanted, part.live_rows)
            count = count * part.view.block.rows // max(1, part.live_rows)
            count = min(count, TRY_FACTOR * wanted) + EXTRA_ROWS
        count = min(count, most)
        rows_BM = self._eligible(part, queries_BQ, count, lists, excluded_B)
        lacking_B = (rows_BM >= 0).sum(1) < enough
        for _ in range(MOST_TRIES - 1):
            again = lacking_B.nonzero().squeeze(1)
            if not len(again) or count >= most:
                break
            count = min(count * TRY_FACTOR, most)
            lists = None if lists is None else lists * TRY_FACTOR
            excluded = None if excluded_B is None else excluded_B[again]
            rows = self._eligible(part, queries_BQ[again], count, lists, excluded)
            rows_BM = torch.nn.functional.pad(rows_BM, (0, count - rows_BM.shape[1]), value=-1)
            rows_BM[again] = rows
            lacking_B[again] = (rows >= 0).sum(1) < enough
        return rows_BM, lacking_B

    def _eligible(
        self,
        part: AcceleratedView,
        queries_BQ: Tensor,
        count: int,
        lists: int | None,
        excluded_B: Tensor | None,
    ) -> Tensor:
        """What FAISS finds, as rows of the epoch, without what may not be returned."""
        inside_BM = part.accelerator.search(queries_BQ, count, part.selection, lists)
        out_BM = inside_BM < 0
        if part.allowed_n is not None and part.selection is None:
            out_BM |= ~part.allowed_n[inside_BM.clamp(min=0)]
        rows_BM = (inside_BM + (part.view.offset - part.view.start)).masked_fill(out_BM, -1)
        if excluded_B is not None:
            documents_BM = self._rows.doc_ids_N[rows_BM.clamp(min=0)]
            rows_BM = rows_BM.masked_fill(documents_BM == excluded_B.unsqueeze(1), -1)
        return rows_BM


def _efforts(recipes: Sequence[Recipe]) -> tuple[Effort, Effort | None]:
    """What is looked at before it is measured, and at most; None: it is not measured.

    Blocks of other sizes have other numbers of lists: the most of any is enough for all.
    """
    if not recipes:
        return Effort(lists=None, candidates_per_hit=1), None
    first = max((recipe.effort for recipe in recipes), key=lambda one: one.lists or 0)
    most = max(recipe.most_lists for recipe in recipes)
    return first, replace(first, lists=most) if most else None


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
