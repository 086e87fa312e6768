"""Groups of consecutive rows of one block: a search looks at their best scores before at rows."""

import torch
from torch import Tensor

from memory_server.index.masked_cells import NEGATIVE_INFINITY, BarredRows, MaskedCells
from memory_server.index.search_queries import SearchQueries
from memory_server.keys.key_blocks import BlockedKeys

GROUP_ROWS = 32
SUPER_GROUPS = 16  # groups whose best is looked at first
PRODUCT_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores of one product: cache, launch
PRODUCT_ROWS = {"cpu": 1 << 14, "cuda": 1 << 20}
PAIR_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 27}  # of rows' keys gathered at once
HELD_MAXIMA = {"cpu": 1 << 21, "cuda": 1 << 26}  # groups' best scores, until the best are taken


class RowGroups:
    """The rows of blocked keys in groups that do not reach over a block's end."""

    def __init__(self, keys: BlockedKeys) -> None:
        self._keys = keys
        starts = [
            torch.arange(view.offset, view.offset + view.rows, GROUP_ROWS) for view in keys.views
        ]
        end = torch.tensor([keys.rows])
        self._starts = torch.cat([*starts, end]).to(keys.device)  # the next group's ends a group
        self._inside = torch.arange(GROUP_ROWS, device=keys.device)
        offsets = torch.tensor([view.offset for view in keys.views] + [keys.rows])
        first_groups = torch.searchsorted(torch.cat([*starts, end]), offsets)
        self._first_groups = first_groups.to(keys.device)

    @property
    def count(self) -> int:
        return len(self._starts) - 1

    @property
    def bytes(self) -> int:
        return self._starts.nbytes

    def best(
        self, queries: SearchQueries, wanted: int, masked: MaskedCells
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `wanted` groups with the highest best scores, best first.

        Returns:
            (groups int64 [B, W], their best scores float32 [B, W], the highest best score of the
            other groups float32 [B]); W is at most `wanted`. -inf where nothing may win.
        """
        batch, device = queries.batch, queries.device
        best_BW = torch.empty(batch, 0, device=device)
        groups_BW = torch.empty(batch, 0, dtype=torch.int64, device=device)
        rest_B = torch.full((batch,), NEGATIVE_INFINITY, device=device)
        pieces = list(self._keys.pieces(_product_rows(batch, device)))
        cells = None if masked.none else masked.cuts([p[0] for p in pieces] + [self._keys.rows])
        maxima_GB = torch.empty(_held_groups(self.count, batch, device), batch, device=device)
        first_group, held = 0, 0

        def take_best() -> None:
            nonlocal best_BW, groups_BW, rest_B
            chosen_BW, values_BW, left_B = _best_groups(maxima_GB, held, wanted)
            best_BW = torch.cat([best_BW, values_BW], dim=1)
            groups_BW = torch.cat([groups_BW, chosen_BW + first_group], dim=1)
            kept_BW, dropped_B = top(best_BW, wanted)
            best_BW, groups_BW = best_BW.gather(1, kept_BW), groups_BW.gather(1, kept_BW)
            rest_B = torch.maximum(rest_B, torch.maximum(left_B, dropped_B))

        for i, (first, last, codes, start) in enumerate(pieces):
            count = last - first
            groups = -(-count // GROUP_ROWS)
            if held + groups > len(maxima_GB):
                take_best()
                first_group, held = first_group + held, 0
            scores_nB, units_B = codes.products(queries, start, start + count)
            if cells is not None:
                cells[i].apply(scores_nB)
            _maxima(scores_nB, maxima_GB[held : held + groups])
            if units_B is not None:
                maxima_GB[held : held + groups].mul_(units_B)
            held += groups
        take_best()
        best_BW, order_BW = best_BW.sort(dim=1, descending=True)
        return groups_BW.gather(1, order_BW), best_BW, rest_B

    def score(
        self,
        queries: SearchQueries,
        groups_BW: Tensor,
        chosen_BW: Tensor,
        barred: BarredRows,
        excluded_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Score the rows of the chosen groups one by one, by what their codes stand for.

        Returns:
            (scores float32 [B, W*R], rows int64 [B, W*R]); -inf and -1 where nothing may win.
        """
        of_queries_P = chosen_BW.nonzero()[:, 0]
        groups_P = groups_BW[chosen_BW]
        excluded_P = None if excluded_B is None else excluded_B[of_queries_P]
        rows_PR = barred.eligible(self._rows(groups_P), excluded_P)
        scores_PR = self._pair_scores(queries.exact_BQ, of_queries_P, groups_P)
        scores_PR.masked_fill_(rows_PR < 0, NEGATIVE_INFINITY)
        shape = (*chosen_BW.shape, GROUP_ROWS)
        scores_BWR = scores_PR.new_full(shape, NEGATIVE_INFINITY)
        rows_BWR = rows_PR.new_full(shape, -1)
        scores_BWR[chosen_BW], rows_BWR[chosen_BW] = scores_PR, rows_PR
        return scores_BWR.flatten(1), rows_BWR.flatten(1)

    def _rows(self, groups_P: Tensor) -> Tensor:
        """The rows of groups, int64 [P, R]; -1 beyond a group's end."""
        rows_PR = self._starts[groups_P].unsqueeze(1) + self._inside
        return rows_PR.masked_fill_(rows_PR >= self._starts[groups_P + 1].unsqueeze(1), -1)

    def _pair_scores(self, queries_BQ: Tensor, of_queries_P: Tensor, groups_P: Tensor) -> Tensor:
        """Scores of pairs of a query and a group, float32 [P, R]; undefined beyond a group's end.

        View by view, so that the rows of a group are found without looking each of them up.
        """
        scores_PR = queries_BQ.new_empty(len(groups_P), GROUP_ROWS)
        where_P = torch.searchsorted(self._first_groups, groups_P, right=True)
        at_once = max(1, PAIR_NUMBERS[queries_BQ.device.type] // (self._keys.width * GROUP_ROWS))
        for position in where_P.unique().tolist():
            view = self._keys.views[position - 1]
            of_view = (where_P == position).nonzero().squeeze(1)
            for pairs in of_view.split(at_once):
                rows_pR = self._starts[groups_P[pairs]].unsqueeze(1) + self._inside
                rows_pR = rows_pR.clamp_(max=view.offset + view.rows - 1) - view.offset
                keys_pRQ = view.block.codes.gather(rows_pR + view.start)
                queries_pQ1 = queries_BQ[of_queries_P[pairs]].unsqueeze(2)
                scores_PR[pairs] = torch.bmm(keys_pRQ, queries_pQ1).squeeze(2)
        return scores_PR


def top(values_BM: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Positions of the `wanted` highest values, int64, and the highest of the other values."""
    if values_BM.shape[1] <= wanted:
        everything = torch.arange(values_BM.shape[1], device=values_BM.device)
        nothing_B = values_BM.new_full((values_BM.shape[0],), NEGATIVE_INFINITY)
        return everything.expand(values_BM.shape[0], -1), nothing_B
    best = values_BM.topk(wanted + 1, dim=1)
    return best.indices[:, :wanted], best.values[:, wanted]


def _maxima(scores_nB: Tensor, maxima_gB: Tensor) -> None:
    """The best score of each group; the last group may be short."""
    rows, batch = scores_nB.shape
    whole = rows // GROUP_ROWS
    if whole:
        grouped = scores_nB[: whole * GROUP_ROWS].view(whole, GROUP_ROWS, batch)
        torch.amax(grouped, dim=1, out=maxima_gB[:whole])
    if whole < len(maxima_gB):
        torch.amax(scores_nB[whole * GROUP_ROWS :], dim=0, out=maxima_gB[whole])


def _best_groups(maxima_GB: Tensor, held: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the best of the first `held` groups, their values, the best of the others.

    Two steps, because `topk` over a long row is slow: the best super-groups hold the best groups.
    """
    batch, device = maxima_GB.shape[1], maxima_GB.device
    supers = -(-held // SUPER_GROUPS)
    if supers <= wanted:
        values_BG = maxima_GB[:held].T
        chosen_BW, left_B = top(values_BG, wanted)
        return chosen_BW, values_BG.gather(1, chosen_BW), left_B
    maxima_GB[held : supers * SUPER_GROUPS] = NEGATIVE_INFINITY
    grouped = maxima_GB[: supers * SUPER_GROUPS].view(supers, SUPER_GROUPS, batch)
    chosen_BS, other_B = top(grouped.amax(dim=1).T.contiguous(), wanted)
    inside = torch.arange(SUPER_GROUPS, device=device)
    near_BM = (chosen_BS.unsqueeze(2) * SUPER_GROUPS + inside).flatten(1)
    values_BM = maxima_GB[near_BM, torch.arange(batch, device=device).unsqueeze(1)]
    kept_BW, left_B = top(values_BM, wanted)
    return (
        near_BM.gather(1, kept_BW),
        values_BM.gather(1, kept_BW),
        torch.maximum(other_B, left_B),
    )


def _product_rows(batch: int, device: torch.device) -> int:
    """Rows of one product: whole groups, so that the scores stay in the cache."""
    rows = min(PRODUCT_SCORES[device.type] // batch, PRODUCT_ROWS[device.type])
    return max(16, rows // GROUP_ROWS) * GROUP_ROWS


def _held_groups(groups: int, batch: int, device: torch.device) -> int:
    """Rows of the buffer of maxima: whole super-groups, room for one product's at least."""
    most = max(HELD_MAXIMA[device.type] // batch, _product_rows(batch, device) // GROUP_ROWS)
    return -(-min(groups, most) // SUPER_GROUPS) * SUPER_GROUPS
