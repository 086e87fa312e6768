"""What a simulation is given: scenarios and measured times, and what is wrong with bad ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.simulation.refusals import BadScenario
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import MEASURED, read_service_times
from tests.cluster.simulation.made_up import told, written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 0}, "shards=0 must be at least 1"),
        ({"steps": 10, "warmup": 10}, "warmup=10 leaves nothing of steps=10 .* from 0 to less"),
        ({"warmup": -1}, "warmup=-1 leaves nothing"),
        ({"jitter": 100.0}, "jitter=100.0 must be between 0 and 1"),
        ({"deadline_s": 0.0}, "deadline_s=0.0 must be greater than 0"),
        ({"latency_s": -1.0}, "latency_s=-1.0 must be 0 or more"),
        ({"bandwidth_bytes_s": 0.0}, "bandwidth_bytes_s=0.0 must be greater than 0"),
        ({"straggler_share": 1.5}, "straggler_share=1.5 must be between 0 and 1"),
        ({"straggler_shape": 1.0}, "straggler_shape=1.0 must be greater than 1"),
        ({"hedge": "p99"}, "hedge='p99'; allowed: 'p95', 'off', or seconds above 0"),
        ({"hedge": -2.0}, "hedge=-2.0; allowed"),
        ({"fan_in": 1}, "fan_in=1 must be at least 2"),
        (
            {"shards": 10, "entries": 9},
            "entries=9 leave some of shards=10 empty; give at least as many",
        ),
        ({"hours": float("nan")}, "hours=nan: give a finite number"),
        ({"shared_cores": -1}, "shared_cores=-1 must be 0"),
        ({"compute_s": -0.1}, "compute_s=-0.1 must be 0 or more"),
    ],
)
def test_a_bad_scenario_says_what_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Scenario(**changes)  # type: ignore[arg-type]


def test_a_bad_scenario_is_told_as_fields_or_as_options() -> None:
    with pytest.raises(BadScenario) as told:
        Scenario(steps=10, warmup=20)
    assert str(told.value).startswith("warmup=20 leaves nothing of steps=10")
    assert told.value.as_options().startswith("--warmup 20 leaves nothing of --steps 10")


def test_a_tenth_of_the_steps_is_left_out_where_nothing_else_is_wanted() -> None:
    assert Scenario(steps=200).left_out == 20
    assert Scenario(steps=10).left_out == 1
    assert Scenario(steps=1).left_out == 0
    assert Scenario(steps=10, warmup=5).left_out == 5


def test_coming_back_takes_longer_with_more_entries_of_a_shard() -> None:
    """By the laws of docs/benchmarks.md: 3.54 s and 4.91 s for each million entries."""
    small, large = Scenario(shards=1, entries=1), Scenario(shards=1, entries=10_000_001)
    assert small.replica_back_s == pytest.approx(5.2, rel=1e-4)
    assert large.replica_back_s - small.replica_back_s == pytest.approx(35.4)
    assert small.trainers_back_s == pytest.approx(7.8, rel=1e-4)
    assert large.trainers_back_s - small.trainers_back_s == pytest.approx(49.1)
    laws = (Path(__file__).parents[3] / "docs/benchmarks.md").read_text(encoding="utf-8")
    for cost, law in (("resume", "3.54 N/10^6"), ("refresh", "4.91 N/10^6")):
        (row,) = [line for line in laws.splitlines() if line.startswith(f"| {cost}, s ")]
        assert law in row


def test_a_nodes_card_is_at_work_for_the_replies_of_all_its_processes() -> None:
    direct = Scenario(shards=4, trainers=2, shards_per_node=8, trainers_per_node=8, replicas=1)
    # Two trainers on one node get four replies each; the shards' node sends as many.
    assert direct.cards_s == pytest.approx(8 * direct.wire_s)
    assert replace(direct, shards=50, fan_in=50, trainers_per_node=1).cards_s == pytest.approx(
        16 * direct.wire_s
    )
    crowd = replace(direct, trainers=100)
    assert crowd.cards_s == pytest.approx(400 * direct.wire_s)
    assert replace(crowd, replicas=2).cards_s == pytest.approx(200 * direct.wire_s)
    # 64 shards in 8 groups: relays send one more reply for each eight that shards send them.
    relayed = Scenario(shards=64, entries=1000, trainers=100, shards_per_node=8)
    assert relayed.groups == 8
    assert relayed.cards_s == pytest.approx(900 * relayed.wire_s)


def test_a_ring_moves_twice_what_each_reduces() -> None:
    two = Scenario(trainers=2, gradient_bytes=1e9, bandwidth_bytes_s=1e9, latency_s=0.0)
    many = Scenario(trainers=1000, gradient_bytes=1e9, bandwidth_bytes_s=1e9, latency_s=0.0)
    assert Scenario(trainers=1, gradient_bytes=1e9).all_reduce_s == 0.0
    assert two.all_reduce_s == pytest.approx(1.0)
    assert many.all_reduce_s == pytest.approx(2.0, rel=0.01)


def test_times_are_read_and_interpolated(tmp_path: Path) -> None:
    times = read_service_times(written(tmp_path / "times.json"))
    assert times.spread.mean() == pytest.approx(1.0)
    known = times.search_s(1000, np.array([1.0, 32.0, 512.0]))
    assert list(known) == pytest.approx([5e-4] * 3, rel=0.15)
    (between,) = times.search_s(50_000, np.array([200.0]))
    assert between == pytest.approx(5e-4 + 50_000 * 200 * 1e-10, rel=0.1)
    (beyond,) = times.search_s(1_000_000, np.array([4096.0]))
    assert beyond == pytest.approx(1_000_000 * 4096 * 1e-10, rel=0.1)
    assert times.search_s(10, np.array([1.0])) == times.search_s(1000, np.array([1.0]))
    assert times.reply_s(256) == pytest.approx(2.6e-4, rel=0.05)
    assert times.hop_s(1) == pytest.approx(1e-4)


def test_the_times_that_come_with_it_are_whole() -> None:
    times = read_service_times(MEASURED)
    grid = times.search_s(1_000_000, np.array([1.0, 32.0, 512.0]))
    assert (np.diff(grid) > 0).all()
    assert (np.diff(times.search_ER[:, -1]) > 0).all()
    assert len(times.compute) >= 50


def test_bad_times_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"times\.json is no JSON.*simulation_check"):
        read_service_times(path)
    whole = told()
    del whole["hop"]
    path.write_text(str(whole).replace("'", '"'), encoding="utf-8")
    with pytest.raises(ValueError, match="has no 'hop'"):
        read_service_times(path)
    with pytest.raises(ValueError, match=r"refresh_slowdown=0\.5 at least 1"):
        read_service_times(written(path, refresh_slowdown=0.5))
    with pytest.raises(ValueError, match="compute_s: give a list of seconds"):
        read_service_times(written(path, compute_s=[]))
    with pytest.raises(ValueError, match=r"not measured for .* \[\(1000, 512\)\]"):
        # The third of them is (1000, 512).
        read_service_times(written(path, search=told()["search"][:2] + told()["search"][3:]))
    with pytest.raises(FileNotFoundError):
        read_service_times(tmp_path / "absent.json")
