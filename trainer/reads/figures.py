"""What counted reads say: how evenly entries are read, and how much of the reading the first take.

Where only a sample was counted, its entries stand for as many others as were left out, and the most
read ones, which are all known, for themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.reads.sample import UNITS, Int64s, Reads

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weighted:
    """Entries, their reads, their attention in reads' shares, and how many entries each stands for,
    the most read first (ties: the lower id)."""

    ids: Int64s
    times: Int64s
    attended: Floats
    weight: Floats


def weighted(reads: Reads) -> Weighted:
    """The entries that a set of counts knows."""
    sampled = reads.sampled
    # What is always among the most read misses the whole of what was taken off.
    times = np.where(sampled, reads.times, reads.times + reads.short)
    most_read = times > 2 * reads.short
    kept = sampled | most_read
    weight = np.where(most_read, 1.0, 2.0**reads.level) if reads.level else np.ones(len(times))
    order = np.lexsort((reads.ids[kept], -times[kept]))
    return Weighted(
        reads.ids[kept][order],
        times[kept][order],
        reads.attended[kept][order] / UNITS,
        weight[kept][order],
    )


def evenness(amounts: npt.NDArray[Any], weight: Floats, *, places: int) -> float:
    """The entropy of a distribution over entries, as a share of the largest that is possible.

    Args:
        amounts: what each entry got. weight: for how many entries it stands.
        places: how many entries could have got something.

    Returns:
        1: all the same, 0: one has it all, or nobody could share it.
    """
    got = amounts > 0
    total = float((weight[got] * amounts[got]).sum())
    if places < 2 or total <= 0:
        return 0.0
    shares = amounts[got] / total
    return min(
        1.0, max(0.0, float(-(weight[got] * shares * np.log(shares)).sum()) / math.log(places))
    )


def distribution(reads: Reads, entries: int) -> dict[str, float]:
    """How reading and attention are spread over the entries.

    Args:
        entries: of the memory.

    Returns:
        `read_evenness`, `attended_evenness` (see `evenness`, over as many entries as there are or
        were asked for, whichever is less), and the share that the first entry has of each,
        `top_read_share` and `top_attended_share`. Nothing, where nothing was read.
    """
    if not reads.all_times:
        return {}
    known = weighted(reads)
    places = min(entries, reads.all_times)
    figures = {
        "read_evenness": evenness(known.times, known.weight, places=places),
        "top_read_share": float(known.times[0] / reads.all_times),
    }
    if reads.all_attended:
        figures |= {
            "attended_evenness": evenness(known.attended, known.weight, places=places),
            "top_attended_share": float(known.attended.max() * UNITS / reads.all_attended),
        }
    return figures


def share_of_most_read(reads: Reads, entries: int) -> float:
    """The share of the reading that the most read `entries` have."""
    if not reads.all_times:
        return 0.0
    known = weighted(reads)
    before = np.cumsum(known.weight) - known.weight
    counted = np.clip(entries - before, 0.0, known.weight)
    return min(1.0, float((counted * known.times).sum() / (known.weight * known.times).sum()))


def times_read(reads: Reads) -> list[dict[str, int]]:
    """How many entries were read 1, 2 to 3, 4 to 7, ... times."""
    known = weighted(reads)
    powers = np.log2(np.maximum(known.times, 1)).astype(np.int64)
    return [
        {
            "from": 2 ** int(power),
            "to": 2 ** (int(power) + 1) - 1,
            "entries": round(float(known.weight[powers == power].sum())),
        }
        for power in np.unique(powers)
    ]
