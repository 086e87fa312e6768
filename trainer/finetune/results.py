"""Mean and deviation of every metric over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.finetune.seed_run import METRICS, WITHOUT, seed_directory

MEASURED = ("test", f"test_{WITHOUT}", "dev", f"dev_{WITHOUT}")
RESULTS = "results.json"


def seed_records(home: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What the finished seeds wrote, in the order given."""
    paths = [seed_directory(home, seed) / METRICS for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and sample standard deviation over seeds, of each metric of what was measured.

    Returns:
        what was measured -> metric -> mean, std (None with one seed), seeds.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in MEASURED:
        rows = [record[name] for record in records if name in record]
        if not rows:
            continue
        found[name] = {}
        for metric in rows[0]:
            values = [row[metric] for row in rows]
            found[name][metric] = {
                "mean": round(statistics.fmean(values), 6),
                "std": round(statistics.stdev(values), 6) if len(values) > 1 else None,
                "seeds": len(values),
            }
    return found
