"""`pluglm memory stats` for a person: every figure under its own name."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from cluster.cli.memory_stats import describe_stats
from memory_server.index.recall_audit import AuditReport
from memory_server.stats import MemoryStats, ShardStats

WHEN = 1764000000.25


def report(
    *, recall: float | None, exact: bool, stale_share: float | None, reason: str, failures: int = 0
) -> AuditReport:
    return AuditReport(
        recall=recall,
        k=5,
        queries=64,
        exact=exact,
        stale_share=stale_share,
        when=WHEN,
        reason=reason,
        failures=failures,
    )


def described(*reports: AuditReport | None) -> list[str]:
    shards = tuple(
        ShardStats(
            shard=number, replica=0, state="serving", recall={} if each is None else asdict(each)
        )
        for number, each in enumerate(reports)
    )
    return describe_stats(
        MemoryStats(
            name="tiny",
            store="a store",
            epoch=1,
            encoder_step=0,
            content_version="0" * 16,
            entries=3,
            key_width=4,
            index="ivf",
            shards=len(shards),
            replicas=1,
            newest_step=0,
            staleness_steps=0,
            live_s=None,
            pins=0,
            epochs=(),
            queries=0,
            overloaded=0,
            bytes={},
            per_shard=shards,
        )
    ).splitlines()


def rows_of(lines: list[str]) -> dict[str, dict[str, str]]:
    """The table of shards by the names of its columns, whose cells here hold no spaces."""
    (at,) = (number for number, line in enumerate(lines) if line.split()[:1] == ["shard"])
    head = lines[at].split()
    cells = [line.split() for line in lines[at + 1 :]]
    return {
        row[0]: dict(zip(head, row, strict=False)) for row in cells if row and row[0][0].isdigit()
    }


def test_recall_is_not_a_clock() -> None:
    low = report(recall=None, exact=True, stale_share=None, reason="not audited yet")
    lines = described(
        report(recall=0.9734, exact=False, stale_share=0.8125, reason="recall is high enough"), low
    )
    rows = rows_of(lines)
    assert (rows["0.0"]["recall"], rows["0.0"]["stale_share"]) == ("0.973", "0.812")
    assert rows["0.0"]["answers"] == "approximately"
    assert (rows["1.0"]["recall"], rows["1.0"]["stale_share"]) == ("-", "-")
    assert rows["1.0"]["answers"] == "exactly"
    assert "answers of 0.0: recall is high enough" in lines
    assert "answers of 1.0: not audited yet" in lines
    assert "1764" not in "\n".join(lines)


def test_one_reason_is_said_once() -> None:
    same = report(recall=1.0, exact=True, stale_share=None, reason="exact: the index is flat")
    lines = described(same, same, None)
    assert "answers of 0.0, 1.0: exact: the index is flat" in lines
    assert rows_of(lines)["2.0"]["answers"] == "-"


@pytest.mark.parametrize("failures", [0, 3])
def test_audits_that_failed_are_told(failures: int) -> None:
    said = report(recall=None, exact=True, stale_share=None, reason="why", failures=failures)
    assert ("3 audits failed" in "\n".join(described(said))) == bool(failures)
