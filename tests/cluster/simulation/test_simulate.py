"""Whole simulations: the same by seed, alike by both methods, and what the command tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.simulation.outcome import Outcome, simulate
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import read_service_times
from tests.cluster.simulation.made_up import service_times, written

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def times_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("times") / "times.json")


def played(times_file: Path, method: str, **changes: object) -> Outcome:
    scenario = Scenario(**{"entries": 100_000} | changes)  # type: ignore[arg-type]
    return simulate(scenario, read_service_times(times_file), method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["events", "statistics"])
@pytest.mark.parametrize(
    "changes",
    [
        {"replicas": 2, "straggler_share": 0.05, "trainers": 3},
        {"shards": 20, "trainers": 3, "steps": 40, "refresh_every_steps": 5},
    ],
    ids=["hedged", "relayed"],
)
def test_the_same_seed_gives_the_same_figures(
    times_file: Path, method: str, changes: dict[str, object]
) -> None:
    first, again, other = (
        played(times_file, method, seed=seed, **changes).as_dict() for seed in (1, 1, 2)
    )
    assert first == again
    assert first["search_p50_ms"] != other["search_p50_ms"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": 1, "trainers": 1},
        {"shards": 8, "trainers": 8},
        {"shards": 4, "trainers": 16, "replicas": 3},
        {"shards": 8, "trainers": 4, "replicas": 2, "straggler_share": 0.05, "steps": 400},
        {"shards": 25, "trainers": 4},
        {"shards": 36, "trainers": 12, "steps": 40},
        {"shards": 2, "trainers": 4, "searches_per_step": 3},
        {"shards": 2, "trainers": 4, "refresh_every_steps": 20},
    ],
    ids=lambda changes: ", ".join(f"{name} {value}" for name, value in changes.items()),
)
def test_both_methods_agree_where_both_can_be_played(
    times_file: Path, changes: dict[str, object]
) -> None:
    events, drawn = (played(times_file, name, **changes) for name in ("events", "statistics"))
    assert drawn.step_ms == pytest.approx(events.step_ms, rel=0.01)
    assert drawn.overhead == pytest.approx(events.overhead, rel=0.12)
    assert drawn.search_p50_ms == pytest.approx(events.search_p50_ms, rel=0.06)
    assert drawn.search_p99_ms == pytest.approx(events.search_p99_ms, rel=0.15)
    assert drawn.staleness_mean == pytest.approx(events.staleness_mean, abs=1.0)


def test_both_methods_turn_away_what_a_full_queue_does_not_take(times_file: Path) -> None:
    crowd = {"shards": 1, "trainers": 48, "queue_limit": 12, "steps": 60}
    events, drawn = (played(times_file, name, **crowd) for name in ("events", "statistics"))
    roomy = played(times_file, "events", **crowd | {"queue_limit": 256})
    assert events.search_p99_ms > 1.2 * roomy.search_p99_ms
    assert drawn.search_p99_ms == pytest.approx(events.search_p99_ms, rel=0.25)


def test_a_second_replica_that_is_asked_late_cuts_the_tail(times_file: Path) -> None:
    slowed = {"shards": 8, "trainers": 2, "replicas": 2, "straggler_share": 0.05, "steps": 400}
    for method in ("events", "statistics"):
        hedged = played(times_file, method, **slowed)
        alone = played(times_file, method, hedge="off", **slowed)
        assert hedged.search_p99_ms < 0.8 * alone.search_p99_ms
    told = played(times_file, "events", **slowed).hedged
    assert told is not None
    assert 0 < told < 0.15


def test_keys_are_as_old_as_a_refresh_and_its_pause_make_them() -> None:
    """Published every 10 steps of 0.1 s, made in 0.45 s: the switch is 5 steps later."""
    scenario = Scenario(
        shards=1, trainers=1, entries=45_000, compute_s=0.1, jitter=0.0, steps=100, warmup=20,
        latency_s=0.0, bandwidth_bytes_s=1e12, refresh_every_steps=10,
    )  # fmt: skip
    times = service_times(search_s=1e-6)
    for method in ("events", "statistics"):
        outcome = simulate(scenario, times, method)  # type: ignore[arg-type]
        assert (outcome.staleness_mean, outcome.staleness_most) == (9.5, 14)
        assert outcome.refresh_s == pytest.approx(0.5, abs=0.01)


def test_a_step_without_a_memory_costs_what_it_computes() -> None:
    scenario = Scenario(
        shards=1, trainers=2, compute_s=0.2, jitter=0.0, latency_s=0.0, bandwidth_bytes_s=1e12
    )
    outcome = simulate(scenario, service_times(search_s=0.0), "events")
    assert outcome.ideal_ms == pytest.approx(200.0)
    assert outcome.overhead == pytest.approx(0.0, abs=1e-6)


def test_whole_steps_are_not_drawn_on_shared_cores(times_file: Path) -> None:
    with pytest.raises(ValueError, match=r"shared_cores=2: .* use the method 'events'"):
        played(times_file, "statistics", shared_cores=2)
    assert played(times_file, "auto", shared_cores=2).method == "events"
    with pytest.raises(ValueError, match="method='guess'; allowed"):
        played(times_file, "guess")


def test_a_large_cluster_is_played_by_statistics(times_file: Path) -> None:
    outcome = played(
        times_file, "auto", shards=1024, trainers=32, steps=4, warmup=1, entries=10_000_000
    )
    assert outcome.method == "statistics"
    assert outcome.search_p99_ms >= outcome.search_p50_ms > 0


def test_the_command_tells_figures(times_file: Path, capsys: Capture) -> None:
    words = ["simulate", "--shards", "2", "--trainers", "2", "--steps", "30", "--warmup", "5"]
    words += ["--service", str(times_file), "--trainer-mtbf-h", "2", "--refresh-every-steps", "5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for name in ("overhead", "search", "keys' age", "goodput", "of a trainer"):
        assert name in shown
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scenario"]["trainer_mtbf_h"] == 2.0
    assert 0 < told["goodput_share"] < 1
    assert told["long_run"]["failures"]["trainer"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards", "0"], "not a whole number of 1 or more"),
        (["--hedge", "p99"], "'p99': give p95, off, or seconds above 0"),
        (["--hours", "-1"], "not a number of 0 or more"),
        (["--shards", "8", "--entries", "4"], "entries=4 leave some of 8 shards empty"),
        (["--service", "absent.json"], "absent.json"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    words: list[str], message: str, capsys: Capture
) -> None:
    assert main(["simulate", *words]) != 0
    assert message in capsys.readouterr().err
