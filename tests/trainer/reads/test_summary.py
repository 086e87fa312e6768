"""What `usage.json` and the report tell of training's reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_server.api import Entry
from memory_server.errors import UnknownEntry
from tests.trainer.report.run_files import ATTACK, metrics, write_run
from trainer.reads.files import Counted
from trainer.reads.sample import Limits, Reads, merged
from trainer.reads.summary import training_usage
from trainer.report.page import write_report

N = 30_000


@dataclass
class Info:
    entries: int
    content_version: str = "v"


class Memory:
    """Entries whose source and domain are told by their ids; the first ones were removed."""

    def __init__(self, removed: int) -> None:
        self._removed = removed

    def info(self) -> Info:
        return Info(N - self._removed)

    def entries(self, ids: list[int]) -> list[Entry]:
        unknown = [i for i in ids if i < self._removed]
        if unknown:
            error = UnknownEntry("removed")
            error.ids = tuple(unknown)
            raise error
        return [
            Entry(id=i, doc_id=i, tokens=(), text=f"text {i}", title="", source=source_of(i))
            for i in ids
        ]


def source_of(entry_id: int) -> str:
    return ("a", "b", "b", "c")[entry_id % 4]


def counted(ids: np.ndarray, limits: Limits) -> Counted:
    total = merged([Reads.of(ids, np.full(len(ids), 0.5))], limits)
    return Counted(total=total, window=Reads.none(), since_step=3)


def told(ids: np.ndarray, limits: Limits, removed: int) -> dict[str, Any]:
    memory: Any = Memory(removed)
    return training_usage(
        9,
        counted(ids, limits),
        memory,
        domains_of=lambda asked: {i: "even" if i % 2 == 0 else "odd" for i in asked},
    )


def test_counts_of_a_short_run_are_exact() -> None:
    ids = np.array([5, 5, 5, 6, 6, 7, 8, 1, 1, 1, 1])
    found = told(ids, Limits(sample=100, most_read=10), removed=5)
    assert (found["from_step"], found["to_step"], found["reads"]) == (3, 9, 11)
    assert (found["used"], found["entries"], found["estimated"]) == (4, N - 5, False)
    assert found["never_used_share"] == 1 - 4 / (N - 5)
    # Entry 1 was read most, and is not there any more.
    assert [(e["id"], e["times"]) for e in found["most_used"]] == [(5, 3), (6, 2), (7, 1), (8, 1)]
    assert found["by_source"] == {"b": 5 / 7, "c": 1 / 7, "a": 1 / 7}
    assert found["attended_by_domain"] == pytest.approx({"odd": 4 / 7, "even": 3 / 7})


def test_sources_of_a_long_run_are_near_the_true_ones() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(N)[(N * rng.random(200_000) ** 3).astype(np.int64)]
    true = Counter(source_of(i) for i in ids.tolist() if i >= 3000)
    total = sum(true.values())
    live = len({i for i in ids.tolist() if i >= 3000})
    for limits in (Limits(sample=1 << 16, most_read=10), Limits(sample=6000, most_read=600)):
        found = told(ids, limits, removed=3000)
        assert found["estimated"] == (limits.sample == 6000)
        assert found["used"] == pytest.approx(live, rel=0.05)
        assert set(found["by_source"]) == {"a", "b", "c"}
        for source, share in found["by_source"].items():
            assert share == pytest.approx(true[source] / total, abs=0.03)
            assert found["attended_by_source"][source] == pytest.approx(share, abs=0.03)


def test_the_report_shows_what_training_counted(tmp_path: Path) -> None:
    lines = metrics()
    for place, line in enumerate(line for line in lines if line["kind"] == "train"):
        line |= {"memory_used_share": place / 20, "memory_read_evenness": 0.5}
        line |= {"memory_attended_evenness": 0.4, "memory_top_read_share": 0.1}
    run = write_run(tmp_path, metrics=lines)
    page = write_report(run).read_text(encoding="utf-8")
    for title in ("Entries that were ever read", "Evenness of the reading", "is read most"):
        assert title in page
    ids = np.array([5, 5, 5, 6, 6, 7, 8])
    found = told(ids, Limits(sample=100, most_read=10), removed=0)
    found["most_used"][0]["text"] = ATTACK
    (run / "usage.json").write_text(json.dumps({"training": found}), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert "Up to step 9 training read 4 of the memory&#x27;s 30,000 entries, in 7 reads" in page
    assert "Reading by source while training" in page
    assert "The entries that training read most" in page
    assert "<script>" not in page


def test_a_run_that_counted_nothing_has_no_such_part(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert "While training" not in page
    (tmp_path / "usage.json").write_text('{"training": {"times_read": 3, "by_source": 4}}')
    assert "How the memory is used" in write_report(tmp_path).read_text(encoding="utf-8")
