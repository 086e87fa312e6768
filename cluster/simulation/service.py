"""How long the parts take, as measured: a JSON file, interpolated between its sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, kw_only=True)
class ServiceTimes:
    """Measured times, in seconds.

    Attributes:
        entries_E, batches_R: the sizes that were measured, ascending.
        search_ER: means of one shard's search of so many entries for so many queries, its reply
            packed, on the cores that a shard has.
        spread: what single searches took over the mean of their size; its mean is 1. Their tail is
            the machine's own, so stragglers of a scenario come on top.
        reply_R: what the asker does per reply: reading it, and its part of the merge.
        hop_R: one way of a message from thread to thread, less what a network adds: packing,
            sockets, waking up.
        send_s: what the asker does per request.
        compute: single measurements of a trainer's step without its searches.
        encode_entries_per_s: of one shard's refresh.
        refresh_slowdown: of its searches meanwhile.
        encode_share: of a shard's refresh that goes on while it searches.
        switch_s: how long training stands still for a switch of the epoch.
    """

    entries_E: Floats
    batches_R: Floats
    search_ER: Floats
    spread: Floats
    reply_R: Floats
    hop_R: Floats
    send_s: float
    compute: Floats
    encode_entries_per_s: float
    refresh_slowdown: float
    encode_share: float
    switch_s: float

    def search_s(self, entries: float, rows: Floats) -> Floats:
        """The mean for searches of so many queries.

        Linear between two measured sizes and beyond the largest, at the last slope; below the
        smallest it is that of the smallest, as fixed costs rule there.
        """
        at_R = np.array(
            [_line(self.entries_E, column, np.asarray(entries, float)) for column in
             self.search_ER.T]
        )  # fmt: skip
        return _line(self.batches_R, at_R, rows)

    def reply_s(self, rows: float) -> float:
        """What the asker does per reply of so many queries."""
        return float(_line(self.batches_R, self.reply_R, np.asarray(rows, float)))

    def hop_s(self, rows: float) -> float:
        """One way of a request, or a reply, of so many queries on one machine."""
        return float(_line(self.batches_R, self.hop_R, np.asarray(rows, float)))

    def spreads(self, random: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
        """Factors of single searches, drawn from those that were measured."""
        return random.choice(self.spread, size)


def _line(at: Floats, values: Floats, wanted: Floats) -> Floats:
    """Linear between points, beyond the last by the last slope, before the first constant."""
    if len(at) == 1:
        return np.asarray(values[0] * np.maximum(1.0, wanted / at[0]), float)
    inside = np.interp(wanted, at, values)
    slope = max(0.0, float((values[-1] - values[-2]) / (at[-1] - at[-2])))
    return np.asarray(inside + slope * np.maximum(0.0, wanted - at[-1]), float)


def read_service_times(path: Path) -> ServiceTimes:
    """Read what `benchmarks/simulation_check.py --service FILE` wrote.

    Raises:
        ValueError: it is no such file; says what is missing or wrong.
        OSError: it cannot be read.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}; {_WHERE_FROM}") from error
    try:
        return _parsed(told)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; {_WHERE_FROM}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {_WHERE_FROM}") from error


_WHERE_FROM = "`python benchmarks/simulation_check.py --service FILE` writes such a file"


def _parsed(told: dict[str, Any]) -> ServiceTimes:
    means: dict[tuple[int, int], float] = {}
    ratios: list[Floats] = []
    for row in told["search"]:
        seconds = _seconds(row["seconds"], "search")
        means[int(row["entries"]), int(row["batch"])] = float(seconds.mean())
        ratios.append(seconds / seconds.mean())
    entries, batches = sorted({e for e, _ in means}), sorted({b for _, b in means})
    missing = [(e, b) for e in entries for b in batches if (e, b) not in means]
    if missing or not means:
        raise ValueError(f"search is not measured for (entries, batch) {missing}")
    rate, slowdown = float(told["encode_entries_per_s"]), float(told["refresh_slowdown"])
    share = float(told["encode_share"])
    if rate <= 0 or slowdown < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"encode_entries_per_s={rate} must be above 0, refresh_slowdown={slowdown} at least 1, "
            f"encode_share={share} between 0 and 1"
        )
    return ServiceTimes(
        entries_E=np.array(entries, float),
        batches_R=np.array(batches, float),
        search_ER=np.array([[means[e, b] for b in batches] for e in entries]),
        spread=np.concatenate(ratios),
        reply_R=_at_batches(told["reply"], "reply", batches),
        hop_R=_at_batches(told["hop"], "hop", batches),
        send_s=float(_seconds([told["send_s"]], "send_s")[0]),
        compute=_seconds(told["compute_s"], "compute_s"),
        encode_entries_per_s=rate,
        refresh_slowdown=slowdown,
        encode_share=share,
        switch_s=float(_seconds([told["switch_s"]], "switch_s")[0]),
    )


def _at_batches(rows: Any, name: str, batches: list[int]) -> Floats:
    """Medians, as single messages may be held up for long by what else the machine does."""
    medians = {int(row["batch"]): float(np.median(_seconds(row["seconds"], name))) for row in rows}
    known = sorted(medians)
    if not known:
        raise ValueError(f"{name}: nothing was measured")
    at_known = np.array([medians[batch] for batch in known])
    return _line(np.array(known, float), at_known, np.array(batches, float))


def _seconds(values: Any, name: str) -> Floats:
    seconds = np.asarray(values, float)
    if seconds.ndim != 1 or not len(seconds) or not np.isfinite(seconds).all() or seconds.min() < 0:
        raise ValueError(f"{name}: give a list of seconds, finite and 0 or more")
    return seconds
