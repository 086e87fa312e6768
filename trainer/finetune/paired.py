"""Two things that were measured with the same seeds: their difference, and a paired test of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Differences of pairs, in numbers.

    Attributes:
        mean: of the differences.
        std: their sample standard deviation; None with one pair.
        t: Student's statistic of the paired test; None where the differences do not vary.
        p: of two sides: how likely a mean this far from 0 is if there is no difference; 1.0 where
            all differences are 0, None where one pair, or equal differences, give no test.
        pairs: how many.
        better: how many differences are above 0.
    """

    mean: float
    std: float | None
    t: float | None
    p: float | None
    pairs: int
    better: int


def paired_difference(values: Sequence[float], others: Sequence[float]) -> PairedDifference:
    """What `values` are above `others`, place by place, with a paired t-test.

    Raises:
        ValueError: no pair, or not as many of both.
    """
    if not values or len(values) != len(others):
        raise ValueError(
            f"a paired test needs pairs, not {len(values)} values beside {len(others)}"
        )
    # Scores are written with six decimals; what a subtraction adds behind them is no difference.
    differences = [round(a - b, 9) for a, b in zip(values, others, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    std = statistics.stdev(differences) if count > 1 else None
    t = mean / (std / math.sqrt(count)) if std else None
    p = None if t is None else two_sided_p(t, count - 1)
    if not any(differences) and count > 1:
        p = 1.0
    return PairedDifference(
        mean=mean,
        std=std,
        t=t,
        p=p,
        pairs=count,
        better=sum(difference > 0 for difference in differences),
    )


def two_sided_p(t: float, degrees: int) -> float:
    """P(|T| >= |t|) of Student's distribution.

    The finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4),
    which is exact but for rounding: differences of about 1e-16.

    Raises:
        ValueError: degrees below 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees = {degrees}: must be at least 1")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # Terms of cos^odd, cos^(odd+2), ... up to cos^(degrees-2), each from the one before.
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))
