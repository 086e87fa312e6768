"""Measured times that are made up, so that tests know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster.simulation.service import ServiceTimes


def service_times(
    *, search_s: float = 1e-3, spread: list[float] | None = None, **changes: Any
) -> ServiceTimes:
    """Every search takes the same, whatever its size; messages and switches take nothing."""
    whole: dict[str, Any] = {
        "entries_E": np.array([1.0, 1e9]),
        "batches_R": np.array([1.0, 1e9]),
        "search_ER": np.full((2, 2), search_s),
        "spread": np.array(spread or [1.0]),
        "reply_R": np.zeros(2),
        "hop_R": np.zeros(2),
        "send_s": 0.0,
        "compute": np.array([0.1]),
        "encode_entries_per_s": 1e5,
        "refresh_slowdown": 1.0,
        "encode_share": 1.0,
        "switch_s": 0.0,
    }
    return ServiceTimes(**whole | changes)


def told(**changes: Any) -> dict[str, Any]:
    """What a file of measured times says."""
    random = np.random.default_rng(0)
    search = [
        {
            "entries": entries,
            "batch": batch,
            "seconds": ((5e-4 + entries * batch * 1e-10) * random.lognormal(0, 0.1, 200)).tolist(),
        }
        for entries in (1000, 100_000)
        for batch in (1, 32, 512)
    ]
    return {
        "search": search,
        "reply": [{"batch": 1, "seconds": [2e-5]}, {"batch": 512, "seconds": [5e-4]}],
        "hop": [{"batch": 1, "seconds": [1e-4]}, {"batch": 512, "seconds": [3e-4]}],
        "send_s": 1e-5,
        "compute_s": random.lognormal(np.log(0.1), 0.02, 200).tolist(),
        "encode_entries_per_s": 3e5,
        "refresh_slowdown": 1.5,
        "encode_share": 0.5,
        "switch_s": 0.01,
    } | changes


def written(path: Path, **changes: Any) -> Path:
    """The same, in a file."""
    path.write_text(json.dumps(told(**changes)), encoding="utf-8")
    return path
