"""How much an approximate search looks at: as little as finds enough for the searches' queries.

The recall of an effort is measured, never estimated, and must reach the aim by its standard error:
on few queries an effort has to find all the more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from memory_server.index.base import RecentQueries
from memory_server.index.recall_gate import MIN_QUERIES

LEAST_AIM = 0.99
TUNING_QUERIES = 128
CANDIDATE_STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What one search spends on a query.

    Attributes:
        lists: inverted lists that are scanned (FAISS's nprobe); None: as FAISS was told.
        candidates_per_hit: how many rows are proposed, and scored by their exact keys, for each
            entry that is wanted.
    """

    lists: int | None
    candidates_per_hit: int

    def describe(self) -> str:
        """In a few words, for people."""
        candidates = f"{self.candidates_per_hit} candidates per entry"
        return candidates if self.lists is None else f"nprobe={self.lists}, {candidates}"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A recall that was measured, and how far it may be off: one standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, found_rows_BK: Tensor, true_rows_BK: Tensor) -> "Recall":
        """Over queries that have any true row; -1 pads. Without such a query it is 1."""
        real_BK = true_rows_BK >= 0
        there_BK = (true_rows_BK.unsqueeze(2) == found_rows_BK.unsqueeze(1)).any(dim=2) & real_BK
        counts_B = real_BK.sum(dim=1)
        shares_B = (there_BK.sum(dim=1) / counts_B.clamp(min=1)).double()[counts_B > 0]
        if not len(shares_B):
            return cls(mean=1.0, error=0.0)
        spread = float(shares_B.std(unbiased=False))
        return cls(mean=float(shares_B.mean()), error=spread / math.sqrt(len(shares_B)))

    def reaches(self, aim: float) -> bool:
        """Whether it is at least the aim even if it was measured too high by its error."""
        return self.mean - self.error >= aim


Measure = Callable[[Effort], Recall]


def aim_for(min_recall: float) -> float:
    """The recall that an effort is chosen for: well above what is still served."""
    return max(LEAST_AIM, (1 + min_recall) / 2)


def least_effort(
    measure: Measure, *, most: Effort, aim: float, cost: Callable[[Effort], float]
) -> Effort:
    """The cheapest effort that reaches the aim, by measuring a few.

    Of two kinds: as few scanned lists as reach the aim, which may take all candidates; and as few
    as miss half of what may be missed, which leaves room for fewer candidates. More of either
    never finds less, so halving finds them.

    Returns:
        `most` if even that does not reach the aim.
    """
    assert most.lists is not None
    ladder = [replace(most, lists=lists) for lists in list_steps(most.lists)]
    seen: dict[Effort, Recall] = {}

    def reaches(effort: Effort, wanted: float) -> bool:
        if effort not in seen:
            seen[effort] = measure(effort)
        return seen[effort].reaches(wanted)

    found = []
    for wanted in (aim, (1 + aim) / 2):
        lists = _first(ladder, partial(reaches, wanted=wanted))
        if lists is not None:
            steps = [*(n for n in CANDIDATE_STEPS if n < most.candidates_per_hit)]
            fewer = [replace(lists, candidates_per_hit=count) for count in steps]
            found.append(_first([*fewer, lists], partial(reaches, wanted=aim)) or lists)
    return min(found, key=cost, default=most)


def list_steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is the last."""
    steps = [n for power in range(most.bit_length()) for n in (2**power, 3 * 2**power // 2)]
    return [*sorted({n for n in steps if n < most}), most]


def tuning_and_judging(recent: RecentQueries) -> tuple[RecentQueries, RecentQueries]:
    """Queries to choose an effort by, and others to judge what it is worth.

    The same ones where there are too few for both.
    """
    few = recent.sample(TUNING_QUERIES + MIN_QUERIES)
    if few.count < 2 * MIN_QUERIES:
        return few.sample(MIN_QUERIES), few.sample(MIN_QUERIES)
    judges = torch.zeros(few.count, dtype=torch.bool)
    judges[torch.arange(MIN_QUERIES) * few.count // MIN_QUERIES] = True
    return few.where(~judges), few.where(judges)


def _first(ladder: Sequence[Effort], good: Callable[[Effort], bool]) -> Effort | None:
    """The first that is good, if the good ones are at the end; by halving."""
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        if good(ladder[middle]):
            high = middle
        else:
            low = middle + 1
    return ladder[low] if low < len(ladder) else None
