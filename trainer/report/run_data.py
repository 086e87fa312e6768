"""What a run directory holds, read leniently: a missing or damaged part becomes a remark."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.metrics import METRICS_FILE, read_metrics
from trainer.report.charts import Series

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The parts of a run; None for one that is not there. ``remarks`` says what is damaged."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None
    samples: Sequence[Mapping[str, Any]] | None
    edits: Mapping[str, Any] | None
    usage: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    notes: Mapping[str, Any] | None
    remarks: Sequence[str]

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The metrics lines of one kind, by step."""
        lines = (line for line in self.metrics if line["kind"] == kind)
        return sorted(lines, key=lambda line: int(line["step"]))

    def series(self, name: str, label: str, *, kind: str = "train") -> Series:
        """One number of the lines of a kind; the lines that lack it are left out."""
        points = [
            (int(line["step"]), finite(line[name])) for line in self.of_kind(kind) if name in line
        ]
        return Series(name=label, points=points)

    def values(self, name: str, *, kind: str = "train") -> list[float]:
        """The finite values of one number, by step."""
        return [v for _, v in self.series(name, name, kind=kind).points if v is not None]


def finite(value: object) -> float | None:
    """The value as a float, or None when it is no number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def read_run(run_dir: Path) -> RunData:
    """Read what is there.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory at {run_dir}; give the directory of a run")
    remarks: list[str] = []

    def part(name: str, read: Callable[[Path], Part], kind: type) -> Part | None:
        path = run_dir / name
        if not path.exists():
            return None
        try:
            found = read(path)
        except (ValueError, OSError) as error:
            remarks.append(f"{name} could not be read: {error}")
            return None
        if not isinstance(found, kind):
            remarks.append(f"{name} does not hold what a run writes there")
            return None
        return found

    return RunData(
        name=run_dir.resolve().name,
        metrics=part(METRICS_FILE, read_metrics, list) or [],
        evaluation=part("evaluation.json", _read_json, dict),
        samples=part("samples.json", _read_json, list),
        edits=part("edits.json", _read_json, dict),
        usage=part("usage.json", _read_json, dict),
        config=part("config.toml", _read_toml, dict),
        notes=part("notes.json", _read_json, dict),
        remarks=remarks,
    )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
