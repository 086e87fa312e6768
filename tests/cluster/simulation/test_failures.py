"""Goodput with failures: against the closed form, and single events against the long run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cluster.simulation.events import play
from cluster.simulation.failures import HOUR_S, kinds_of, long_run, victims
from cluster.simulation.refusals import BadScenario
from cluster.simulation.scenario import Scenario
from tests.cluster.simulation.made_up import service_times


def run(scenario: Scenario, step_s: float = 1.0, seed: int = 0) -> float:
    return long_run(scenario, step_s, np.random.default_rng(seed)).share


@pytest.mark.parametrize(("every", "save_s"), [(100, 5.0), (600, 5.0), (600, 0.0)])
def test_goodput_with_exponential_failures_is_the_closed_form(every: int, save_s: float) -> None:
    """A round of w seconds of work and c of saving takes (1/λ + R)(exp(λ(w + c)) - 1) on average,
    if nothing fails while trainers start anew. One trainer does not, in the start of itself."""
    mtbf_s, restart_s = 900.0, 60.0
    scenario = Scenario(
        trainers=1,
        trainer_mtbf_h=mtbf_s / HOUR_S,
        trainer_restart_s=restart_s,
        renew_s_per_entry=0.0,
        checkpoint_every_steps=every,
        checkpoint_s=save_s,
        hours=8000.0,
    )
    rate = 1 / mtbf_s
    # A death during a start begins it again: the start itself takes this long on average.
    start_s = (math.exp(rate * restart_s) - 1) / rate
    round_s = (1 / rate + start_s) * (math.exp(rate * (every + save_s)) - 1)
    assert run(scenario) == pytest.approx(every / round_s, rel=0.03)


def test_without_failures_only_checkpoints_cost() -> None:
    scenario = Scenario(checkpoint_every_steps=90, checkpoint_s=10.0, hours=100.0)
    assert run(scenario) == pytest.approx(0.9, rel=1e-3)
    assert run(replace(scenario, checkpoint_s=0.0)) == pytest.approx(1.0)


def test_a_lost_shard_stops_training_for_as_long_as_it_is_down() -> None:
    """One shard of which a replica fails at rate λ and is down for D: 1/(1 + λD) of the time."""
    scenario = Scenario(
        shards=1, entries=1000, replica_mtbf_h=0.1, replica_restart_s=90.0,
        restore_s_per_entry=0.0, hours=20_000.0,
    )  # fmt: skip
    assert run(scenario) == pytest.approx(1 / (1 + 90 / 360), rel=0.01)


def test_a_second_replica_is_worth_the_square() -> None:
    """Both are down at once for (λD/(1 + λD))² of the time, as each is, and they do not care."""
    scenario = Scenario(
        shards=1, replicas=2, entries=1000, replica_mtbf_h=0.1, replica_restart_s=90.0,
        restore_s_per_entry=0.0, hours=20_000.0,
    )  # fmt: skip
    down = 0.25 / 1.25
    lost = 1 - run(scenario)
    # Restarts take a fixed time, so this is near and not exact.
    assert lost == pytest.approx(down**2, rel=0.15)


def test_a_node_takes_its_shards_and_never_both_replicas_of_one() -> None:
    scenario = Scenario(shards=20, replicas=2, shards_per_node=8, memory_node_mtbf_h=1.0)
    (kind,) = kinds_of(scenario)
    assert kind.members == 6
    struck = [victims(scenario, kind.name, member) for member in range(kind.members)]
    assert sorted(r for group in struck for r in group) == [
        (shard, replica) for shard in range(20) for replica in range(2)
    ]
    for group in struck:
        assert len({shard for shard, _ in group}) == len(group)


def accelerated(**changes: object) -> Scenario:
    whole: dict[str, object] = {
        "shards": 2, "trainers": 2, "entries": 1000, "steps": 4000, "warmup": 0,
        "compute_s": 0.1, "jitter": 0.0, "latency_s": 0.0, "bandwidth_bytes_s": 1e12,
        "checkpoint_every_steps": 50, "checkpoint_s": 0.0, "replica_restart_s": 4.0,
        "restore_s_per_entry": 0.0, "trainer_restart_s": 5.0, "detection_s": 2.0, "hours": 50.0,
    }  # fmt: skip
    return Scenario(**whole | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "what",
    [
        {"replica_mtbf_h": 0.02},
        {"memory_node_mtbf_h": 0.02, "shards_per_node": 1, "heartbeat_timeout_s": 1.0},
        {"trainer_mtbf_h": 0.03, "steps": 12_000},
        {"trainer_node_mtbf_h": 0.02, "trainers_per_node": 2, "steps": 12_000},
    ],
    ids=lambda what: next(iter(what)),
)
def test_single_events_and_the_long_run_agree(what: dict[str, object]) -> None:
    scenario = accelerated(**what)
    noted = play(scenario, service_times(search_s=1e-3))
    assert noted.failures > 10
    # Without the failures a step takes its computing and one search.
    by_events = noted.useful_steps * 0.101 / noted.seconds
    assert by_events < 0.95
    assert by_events == pytest.approx(run(scenario, 0.101), rel=0.1)


def test_with_two_replicas_a_death_is_hardly_felt() -> None:
    one = play(accelerated(replica_mtbf_h=0.02), service_times())
    two = play(accelerated(replica_mtbf_h=0.02, replicas=2), service_times())
    assert max(one.step_s) > 3.0
    assert np.quantile(two.step_s, 0.99) < 0.2
    assert min(one.failures, two.failures) > 2


def test_a_node_that_keeps_silent_is_left_by_hedges_at_once() -> None:
    silent = accelerated(memory_node_mtbf_h=0.05, replicas=2, shards_per_node=1)
    hedged = play(silent, service_times())
    alone = play(replace(silent, hedge="off"), service_times())
    # Without hedges a client waits for the connection's heartbeats.
    assert max(alone.step_s) > silent.heartbeat_timeout_s
    assert np.mean(hedged.step_s) < np.mean(alone.step_s)


def test_trainers_start_later_where_a_shard_has_more_keys_to_make_anew() -> None:
    often = accelerated(trainer_mtbf_h=0.03, steps=2000, entries=2_000_000)
    slowly = replace(often, renew_s_per_entry=20e-6)
    starts = [
        long_run(scenario, 0.101, np.random.default_rng(0)).restarting_s
        for scenario in (replace(often, renew_s_per_entry=0.0), slowly)
    ]
    # 5 s, and 5 s and 20 s more; some deaths fall within a start and begin it again.
    assert starts[1] > 3 * starts[0]
    played = [
        play(replace(often, renew_s_per_entry=seconds), service_times()).seconds
        for seconds in (0.0, 20e-6)
    ]
    assert played[1] > played[0] + 19.0


def test_steps_that_are_never_made_are_given_up() -> None:
    """A replica that dies before it can answer, again and again."""
    scenario = accelerated(replica_mtbf_h=1e-6, steps=10, replica_restart_s=1e-4)
    with pytest.raises(BadScenario, match=r"than 20,000 failures while \d+ of steps=10 were"):
        play(scenario, service_times(search_s=1.0))


def test_a_step_that_takes_no_time_has_no_goodput() -> None:
    with pytest.raises(ValueError, match=r"step_s=0\.0: a step must take some time"):
        long_run(Scenario(), 0.0, np.random.default_rng(0))
