"""Which rows may win: found by float32 products with keys or their codes, proven by error bounds.

What is not among the candidates is told by the highest score that it may have, so that the search
can tell whether a winner may have been missed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_server.index.masked_cells import NEGATIVE_INFINITY, BarredRows
from memory_server.index.row_groups import RowGroups, top
from memory_server.index.search_queries import SearchQueries
from memory_server.keys.key_blocks import BlockedKeys

EXTRA_GROUPS = 11  # beyond k: room for the certificate to succeed
EXTRA_ROWS = 11
CODED_GROUPS = 59
CODED_ROWS = 43
FIRST_EXTRA = 2  # beyond k: groups and rows from which the k-th best exact score is estimated

ExactScores = Callable[[Tensor], Tensor]
"""Rows, int64 [B, M], -1 for none, to their exact scores, float32 [B, M], -inf for none."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows that may win, and what is known of the others.

    Attributes:
        rows_BM: int64, -1 for none.
        scores_BM: their exact scores, float32, -inf for none; None if they are not known yet.
        rest_B: all other rows score lower than this, float32; -inf where there is none.
    """

    rows_BM: Tensor
    scores_BM: Tensor | None = None
    rest_B: Tensor


def rounding_bound(queries: SearchQueries, keys: BlockedKeys) -> Tensor:
    """How far a float32 inner product can be from the true one, in any order: Q·u·|q|·|k|."""
    width = queries.exact_BQ.shape[1]
    largest = keys.largest_norm + largest_error(keys)
    return queries.norms * ((width + 4) * _unit(queries.device) * largest)


def by_keys(
    queries: SearchQueries,
    groups: RowGroups,
    k: int,
    barred: BarredRows,
    excluded_B: Tensor | None,
    bound_B: Tensor,
) -> Candidates:
    """Candidates of exact keys.

    A group or row whose score is more than 4 bounds below the k-th best cannot win: 1 for either's
    product, and 1 for the rounding of either's final score.
    """
    groups_BW, best_BW, rest_B = groups.best(queries, k + EXTRA_GROUPS, barred.cells(excluded_B))
    hopeful_BW = _as_wide_as_needed(_within(best_BW, k, 4 * bound_B))
    groups_BW = groups_BW[:, : hopeful_BW.shape[1]]
    scores_BM, rows_BM = groups.score(queries, groups_BW, hopeful_BW, barred, excluded_B)
    scores_BM, rows_BM, dropped_B = _best_first(scores_BM, rows_BM, k + EXTRA_ROWS)
    hopeful_BM = _as_wide_as_needed(_within(scores_BM, k, 4 * bound_B))
    rows_BM = rows_BM[:, : hopeful_BM.shape[1]].masked_fill(~hopeful_BM, -1)
    return Candidates(rows_BM=rows_BM, rest_B=torch.maximum(rest_B, dropped_B) + 2 * bound_B)


def by_codes(
    queries: SearchQueries,
    keys: BlockedKeys,
    groups: RowGroups,
    k: int,
    barred: BarredRows,
    excluded_B: Tensor | None,
    bound_B: Tensor,
    exact_scores: ExactScores,
    *,
    room: int = 1,
) -> Candidates:
    """Candidates of codes, in two rounds, because an exact key is dear.

    The best rows of the best groups, scored exactly, tell what the k-th best score is at least.
    Then only the groups, and of them the rows, that can reach it by what their codes may be wrong
    are looked at: `room` times as many as are enough for almost every query.
    """
    wanted = k + room * CODED_GROUPS
    groups_BW, best_BW, rest_B = groups.best(queries, wanted, barred.cells(excluded_B))
    first_BW = best_BW[:, : k + FIRST_EXTRA] != NEGATIVE_INFINITY
    first_groups_BW = groups_BW[:, : first_BW.shape[1]]
    scores_BM, rows_BM = groups.score(queries, first_groups_BW, first_BW, barred, excluded_B)
    _, tried_BM, _ = _best_first(scores_BM, rows_BM, k + FIRST_EXTRA)
    tried_scores_BM = exact_scores(tried_BM)
    least_B = queries.norms.new_full((queries.batch,), NEGATIVE_INFINITY)
    if tried_BM.shape[1] >= k:
        least_B = tried_scores_BM.topk(k, dim=1).values[:, -1]
    product_B = 2 * bound_B + _product_error(queries, keys)
    hopeful_BW = best_BW != NEGATIVE_INFINITY
    hopeful_BW &= ~(best_BW + product_B.unsqueeze(1) < least_B.unsqueeze(1))
    hopeful_BW[:, : first_BW.shape[1]] = False
    hopeful_BW = _as_wide_as_needed(hopeful_BW)
    more_scores_BM, more_rows_BM = groups.score(
        queries, groups_BW[:, : hopeful_BW.shape[1]], hopeful_BW, barred, excluded_B
    )
    scores_BM = torch.cat([scores_BM, more_scores_BM], dim=1)
    rows_BM = torch.cat([rows_BM, more_rows_BM], dim=1)
    scores_BM, rows_BM, dropped_B = _best_first(scores_BM, rows_BM, k + room * CODED_ROWS)
    reach_BM = scores_BM + queries.norms.unsqueeze(1) * row_errors(keys, rows_BM)
    hopeful_BM = (rows_BM >= 0) & ~(reach_BM + 2 * bound_B.unsqueeze(1) < least_B.unsqueeze(1))
    hopeful_BM &= ~(rows_BM.unsqueeze(2) == tried_BM.unsqueeze(1)).any(dim=2)
    hopeful_BM = _as_wide_as_needed(hopeful_BM)
    rows_BM = rows_BM[:, : hopeful_BM.shape[1]].masked_fill(~hopeful_BM, -1)
    codes_B = 2 * bound_B + queries.norms * largest_error(keys)
    return Candidates(
        rows_BM=torch.cat([tried_BM, rows_BM], dim=1),
        scores_BM=torch.cat([tried_scores_BM, exact_scores(rows_BM)], dim=1),
        rest_B=torch.maximum(rest_B + product_B, dropped_B + codes_B),
    )


def largest_error(keys: BlockedKeys) -> float:
    """The largest distance of any row's codes from its exact key."""
    return max((block.codes.largest_error for block in keys.blocks), default=0.0)


def row_errors(keys: BlockedKeys, rows: Tensor) -> Tensor:
    """How far the codes of these rows are from their exact keys at most; rows below 0: of any."""
    errors = torch.zeros(rows.shape, device=rows.device)
    for view in keys.views:
        if not view.block.codes.exact:
            inside = (rows >= view.offset) & (rows < view.offset + view.rows)
            errors[inside] = view.block.codes.errors(rows[inside] - view.offset + view.start)
    return errors


def _product_error(queries: SearchQueries, keys: BlockedKeys) -> Tensor:
    errors_B = torch.zeros_like(queries.norms)
    for block in set(keys.blocks):
        errors_B = torch.maximum(errors_B, block.codes.product_error(queries, block.largest_norm))
    return errors_B


def _unit(device: torch.device) -> float:
    exact = (
        torch.get_float32_matmul_precision() == "highest"
        if device.type == "cpu"
        else not torch.backends.cuda.matmul.allow_tf32
    )
    return 2.0**-24 if exact else 2.0**-8  # TF32 and bfloat16 round the operands


def _best_first(scores_BM: Tensor, rows_BM: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` best, the best first, and the highest score of the others."""
    kept_BM, dropped_B = top(scores_BM, wanted)
    ordered = scores_BM.gather(1, kept_BM).sort(dim=1, descending=True)
    return ordered.values, rows_BM.gather(1, kept_BM.gather(1, ordered.indices)), dropped_B


def _within(scores_BM: Tensor, k: int, margin_B: Tensor) -> Tensor:
    """Which scores, the best first, are within the margin of the k-th; NaN is, -inf is not."""
    within_BM = scores_BM != NEGATIVE_INFINITY
    if k <= scores_BM.shape[1]:
        within_BM &= ~(scores_BM < scores_BM[:, k - 1 : k] - margin_B.unsqueeze(1))
    return within_BM


def _as_wide_as_needed(chosen_BM: Tensor) -> Tensor:
    """Without the columns, at the end, of which nothing is chosen."""
    chosen = chosen_BM.any(dim=0).nonzero()
    return chosen_BM[:, : int(chosen[-1]) + 1 if len(chosen) else 0]
