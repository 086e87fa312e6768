"""Whole simulations: the same by seed, alike by both methods, and what the command tells."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.cli.simulate import SIMULATE
from cluster.simulation.limits import refuse_too_many_events, refuse_too_many_failures
from cluster.simulation.outcome import Outcome, shown, simulate
from cluster.simulation.refusals import BadScenario
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


def test_what_is_later_than_the_deadline_is_told_to_fail(times_file: Path) -> None:
    quick, late = (
        played(times_file, "events", shards=2, steps=20, deadline_s=seconds)
        for seconds in (60.0, 1e-5)
    )
    assert (quick.late, late.late) == (0.0, 1.0)
    assert dict(quick.rows())["deadline"] == "no search took longer than 60 s"
    told = dict(late.rows())["deadline"]
    assert "100 % of the searches took longer than 1e-05 s: SUCH A SYSTEM WOULD FAIL" in told


def test_a_replica_that_is_back_after_the_deadline_is_told(times_file: Path) -> None:
    rare = {"shards": 2, "steps": 20, "replica_mtbf_h": 1e5}
    soon, late = (
        dict(played(times_file, "events", replica_restart_s=seconds, **rare).rows())
        for seconds in (5.0, 61.0)
    )
    assert "not counted" not in soon
    assert "later than the deadline of 60 s" in late["not counted"]


def test_cards_that_are_not_waited_for_are_told_where_they_matter(times_file: Path) -> None:
    slow, fast = (
        dict(played(times_file, "events", shards=8, steps=20, bandwidth_bytes_s=rate).rows())
        for rate in (1e6, 1e12)
    )
    assert "searches take longer than told" in slow["network cards"]
    assert "small beside a search" in fast["network cards"]


def test_a_refresh_that_did_not_finish_is_told(times_file: Path) -> None:
    outcome = played(times_file, "events", shards=1, steps=12, refresh_every_steps=10)
    assert dict(outcome.rows())["refresh"] == "none finished in 12 steps; simulate more steps"
    assert "refresh" not in dict(played(times_file, "events", shards=1, steps=12).rows())


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (0.126, "0.13"), (7.0, "7.00"), (12.34, "12.3"), (999.6, "1,000"),
     (120_179.0, "120,000"), (-3.217, "-3.22")],
)  # fmt: skip
def test_figures_have_three_digits(number: float, text: str) -> None:
    assert shown(number) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 20_000, "trainers": 20_000}, "make 400,000,000; at most 20,000,000 .* fewer"),
        ({"shards": 20_000, "replicas": 20_000}, "replicas=20000 make 400,000,000; at most"),
        ({"steps": 10**10}, "steps=10000000000 of 16 requests .* give fewer steps"),
        ({"searches_per_step": 10**9, "steps": 1}, "give fewer searches_per_step"),
        ({"replica_mtbf_h": 1e-6}, "replica_mtbf_h=1e-06 and hours=24.0 mean about 96,000,000"),
        ({"memory_node_mtbf_h": 1e-6}, "give at least .* h between failures, or fewer hours"),
        (
            {"trainer_mtbf_h": 1e-3, "compute_s": 1.0},
            "trainer_mtbf_h=0.001: a trainer dies every 0.9 s, and 200 steps .* at least 200 s",
        ),
    ],
)
def test_too_much_is_refused_before_any_work(
    times_file: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BadScenario, match=message):
        played(times_file, "auto", **changes)


def test_too_many_events_are_refused(times_file: Path) -> None:
    with pytest.raises(BadScenario, match="at most 30,000,000 are played: give fewer steps"):
        played(times_file, "events", shards=1000, trainers=100)
    with pytest.raises(BadScenario, match="at most 200,000 are played one by one"):
        played(times_file, "events", shards=1000, replicas=1000, trainers=1, steps=1)


def test_what_is_advised_against_failures_is_let_in(times_file: Path) -> None:
    for changes, name in (
        ({"replica_mtbf_h": 1e-6}, "replica_mtbf_h"),
        ({"trainer_mtbf_h": 1e-3, "compute_s": 1.0}, "trainer_mtbf_h"),
    ):
        with pytest.raises(BadScenario) as refused:
            played(times_file, "auto", **changes)
        told = re.search(r"give at least (\S+) h", str(refused.value))
        assert told is not None
        scenario = Scenario(**changes | {name: float(told[1])})  # type: ignore[arg-type]
        refuse_too_many_failures(scenario)
        refuse_too_many_events(scenario, 1, service_times())


def test_the_command_has_json_for_a_step_that_takes_no_time(
    times_file: Path, capsys: Capture
) -> None:
    words = ["simulate", "--trainers", "1", "--compute-s", "0", "--steps", "10"]
    words += ["--service", str(times_file)]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told["overhead"] is None
    assert main(words) == 0
    assert "without the memory a step takes no time" in capsys.readouterr().out


def test_the_command_takes_entries_as_the_plan_does(times_file: Path, capsys: Capture) -> None:
    words = ["simulate", "--entries", "1e9", "--steps", "4", "--compute-s", "0.1", "--json"]
    assert main([*words, "--service", str(times_file)]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"]["entries"] == 10**9


def test_the_help_tells_every_default(capsys: Capture) -> None:
    parser = SIMULATE.parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown_help = " ".join(capsys.readouterr().out.split())
    for field in fields(Scenario):
        if field.name in {"max_batch_rows", "relays_at_once", "heartbeat_timeout_s"}:
            continue  # no options
        flag = f"--{field.name.replace('_', '-')} "
        told = shown_help[shown_help.index(flag, shown_help.index(" options: ")) :]
        default = told[told.index("(default: ") + 10 :].split(")")[0]
        if field.name in {"warmup", "compute_s", "fan_in"}:
            assert field.default is None
        elif field.name == "hedge":
            assert default == field.default
        else:
            assert float(default) == field.default


def test_the_document_prints_no_search_that_would_have_failed() -> None:
    document = (Path(__file__).parents[3] / "docs/simulation.md").read_text(encoding="utf-8")
    large = document[document.index("## What it says of large clusters") :]
    told = re.findall(r"(?:([\d,.]+)|> 60 s) / ([\d,.]+)", large)
    assert len(told) > 50
    for p50, p99 in told:
        assert float(p50.replace(",", "")) <= float(p99.replace(",", "")) <= 60_000


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
        (["--shards", "8", "--entries", "4"], "--entries 4 leave some of --shards 8 empty"),
        (["--entries", "1e16"], "'1e16' is not a whole number from 1 to 1e+14"),
        (["--entries", "1.5"], "'1.5' is not a whole number"),
        (["--steps", "10", "--warmup", "20"], "--warmup 20 leaves nothing of --steps 10"),
        (["--compute-before", "2"], "--compute-before 2.0 must be between 0 and 1"),
        (["--jitter", "100"], "--jitter 100.0 must be between 0 and 1"),
        (["--shards", "20000", "--trainers", "20000"], "give fewer --shards or --trainers"),
        (["--replica-mtbf-h", "0.000001"], "--replica-mtbf-h 1e-06 and --hours 24.0 mean about"),
        (["--service", "absent.json"], "absent.json"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    words: list[str], message: str, capsys: Capture
) -> None:
    assert main(["simulate", *words]) != 0
    assert message in capsys.readouterr().err
