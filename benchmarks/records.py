"""Ratios out of a benchmark's figures, records of them by machine, and how the two compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import Spread, table
from suite import Benchmark, RatioOf

RECORDED = Path(__file__).with_name("recorded")
OK, WORSE, MISSING, UNKNOWN = "ok", "WORSE", "MISSING", "not recorded"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One ratio against a named peer.

    Attributes:
        name: the row and the field, which is what a record knows it by.
        better: "lower" or "higher".
    """

    name: str
    against: str
    better: str
    spread: Spread


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A ratio beside the recorded one; `allowed` is the worst that is not WORSE."""

    benchmark: str
    name: str
    ratio: Spread | None
    recorded: Spread | None
    allowed: float | None
    better: str
    verdict: str


def ratios_of(benchmark: Benchmark, figures: Any) -> list[Ratio]:
    """The ratios that the table names.

    Raises:
        ValueError: the figures have no such field, or no row.
    """
    found = [one for which in benchmark.ratios for one in _ratios(which, figures)]
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"{benchmark.name}: {sorted(twice)[0]} is there twice: name more `rows` in the table"
        )
    return found


def allowed(recorded: Spread, better: str, tolerance: float) -> float:
    """The worst ratio that passes: `tolerance` worse than the recorded median, or the worst one of
    the record where that is further away, because the machine alone can do as much."""
    if better == "lower":
        return max(recorded.median * (1 + tolerance), recorded.high)
    return min(recorded.median / (1 + tolerance), recorded.low)


def compare(
    benchmark: str, now: Sequence[Ratio], recorded: Sequence[Ratio], tolerance: float
) -> list[Verdict]:
    """One verdict for every ratio that is measured or recorded."""
    old = {one.name: one for one in recorded}
    verdicts = []
    for one in now:
        before = old.pop(one.name, None)
        limit = None if before is None else allowed(before.spread, one.better, tolerance)
        verdicts.append(
            Verdict(
                benchmark=benchmark,
                name=one.name,
                ratio=one.spread,
                recorded=None if before is None else before.spread,
                allowed=limit,
                better=one.better,
                verdict=UNKNOWN if limit is None else _judge(one, limit),
            )
        )
    gone = [
        Verdict(
            benchmark=benchmark,
            name=one.name,
            ratio=None,
            recorded=one.spread,
            allowed=allowed(one.spread, one.better, tolerance),
            better=one.better,
            verdict=MISSING,
        )
        for one in old.values()
    ]
    return verdicts + gone


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown."""

    def row(one: Verdict) -> list[str]:
        sign = {"lower": "at most", "higher": "at least"}[one.better]
        return [
            f"{one.benchmark}: {one.name}",
            "" if one.ratio is None else one.ratio.shown(),
            "" if one.recorded is None else one.recorded.shown(),
            "" if one.allowed is None else f"{sign} {one.allowed:,.2f}",
            one.verdict,
        ]

    return table(["figure", "ratio", "recorded", "allowed", "verdict"], [*map(row, verdicts)])


def ratio_table(ratios: Mapping[str, Sequence[Ratio]]) -> str:
    """The ratios of several benchmarks as Markdown."""
    rows = [
        [f"{benchmark}: {one.name}", one.against, one.spread.shown(), one.better]
        for benchmark, several in ratios.items()
        for one in several
    ]
    return table(["figure", "against", "ratio", "better"], rows)


def entry_of(left: Mapping[str, Any], ratios: Sequence[Ratio], *, note: str = "") -> dict[str, Any]:
    """What is kept of a finished benchmark: arguments, machine, seconds and ratios."""
    kept = {key: left[key] for key in ("words", "machine", "seconds")}
    return {**kept, "note": note, "ratios": [asdict(one) for one in ratios]}


def ratios_of_entry(entry: Mapping[str, Any]) -> list[Ratio]:
    """The ratios that `entry_of` kept."""
    return [Ratio(**{**one, "spread": Spread(**one["spread"])}) for one in entry["ratios"]]


def find_record(
    folder: Path, benchmark: Benchmark, *, cpu: str, gpu: str | None
) -> dict[str, Any] | None:
    """What is recorded of a benchmark on such a machine: the same GPU if it needs one, else CPU."""
    key, value = ("gpu", gpu) if "gpu" in benchmark.needs else ("cpu", cpu)
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        if record[key] == value and benchmark.name in record["benchmarks"]:
            entry: dict[str, Any] = record["benchmarks"][benchmark.name]
            return entry
    return None


def read_record(path: Path) -> dict[str, Any]:
    """A whole record.

    Raises:
        ValueError: it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(record, dict) or not {"cpu", "gpu", "benchmarks"} <= record.keys():
        raise ValueError(f"{path}: is no record: it must have cpu, gpu and benchmarks")
    return record


def write_record(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], *, cpu: str, gpu: str | None
) -> Path:
    """Put these benchmarks into the record of this machine; others of it are kept."""
    path = folder / f"{_slug(cpu if gpu is None else f'{cpu} {gpu}')}.json"
    record = read_record(path) if path.exists() else {"cpu": cpu, "gpu": gpu, "benchmarks": {}}
    record["benchmarks"].update(entries)
    record["benchmarks"] = dict(sorted(record["benchmarks"].items()))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _ratios(which: RatioOf, figures: Any) -> list[Ratio]:
    rows = _at(figures, which.at) if which.at else figures
    found = []
    for row in rows if isinstance(rows, list) else [rows]:
        if any(row.get(key) not in values for key, values in which.only.items()):
            continue
        value = _at(row, which.field)
        if value is None:  # the peer's own row
            continue
        if not isinstance(value, dict):
            value = {"median": value, "low": value, "high": value, "count": 1}
        named = ", ".join(f"{key} {_at(row, key)}" for key in which.rows)
        found.append(
            Ratio(
                name=f"{which.field} ({named})" if named else which.field,
                against=which.against,
                better=which.better,
                spread=Spread(**value),
            )
        )
    if not found:
        raise ValueError(f"no row of the figures has {which.field} as the table asks for")
    return found


def _at(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"the figures have no {path}; they have: {has}")
        row = row[key]
    return row


def _judge(now: Ratio, limit: float) -> str:
    worse = now.spread.median > limit if now.better == "lower" else now.spread.median < limit
    return WORSE if worse else OK


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
