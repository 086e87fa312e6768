"""A whole cluster played as events: every request of every step."""

from __future__ import annotations

import math
import random

import numpy as np
import simpy

from cluster.simulation.clients import Client, Costs, Counts
from cluster.simulation.draws import compute_draws, search_draws
from cluster.simulation.failures import fail_and_recover, kinds_of
from cluster.simulation.parts import Cores, Replica, ReplicaSettings
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import ServiceTimes
from cluster.simulation.trainers import Noted, Trainers

FAILURES_AT_MOST = 20_000  # while single steps are played, which are few


def play(scenario: Scenario, service: ServiceTimes) -> Noted:
    """Simulate `scenario.steps` steps; the same scenario, seed and times give the same result.

    Raises:
        BadScenario: so much fails that the steps are hardly ever made.
    """
    env = simpy.Environment()
    streams = np.random.SeedSequence(scenario.seed).spawn(4)
    # Trainers compute the same in scenarios that differ in the memory only.
    computing, searching, failing, lots = (np.random.default_rng(stream) for stream in streams)
    lot = random.Random(int(lots.integers(1 << 62)))
    shared = Cores(env, scenario.shared_cores)
    settings = ReplicaSettings(
        search_s=search_draws(scenario, service, searching),
        queue_limit=scenario.queue_limit,
        max_batch_rows=scenario.max_batch_rows,
        relays_at_once=scenario.relays_at_once,
        encode_s=scenario.entries_per_shard / service.encode_entries_per_s,
        refresh_slowdown=service.refresh_slowdown,
        encode_share=service.encode_share,
    )
    shards = [
        [
            Replica(
                env,
                settings,
                shared,
                shared if scenario.shared_cores else Cores(env, 1),
            )
            for _ in range(scenario.replicas)
        ]
        for _ in range(scenario.shards)
    ]
    costs = Costs(
        send_s=service.send_s,
        reply_s=max(service.reply_s(scenario.batch), scenario.wire_s),
        hop_s=service.hop_s(scenario.batch),
    )
    made: list[Client] = []

    def clients() -> list[Client]:
        new = [
            Client(env, scenario, shards, costs, cores=shared, lot=lot)
            for _ in range(scenario.trainers)
        ]
        made.extend(new)
        return new

    trainers = Trainers(
        env,
        scenario,
        service,
        shards,
        clients,
        compute_draws(scenario, service, computing),
        cores=shared,
    )

    def stop_trainers(unnoticed_s: float) -> None:
        if not trainers.failed.triggered:
            trainers.failed.succeed(unnoticed_s)

    def count_one() -> None:
        trainers.noted.failures += 1
        if trainers.noted.failures > FAILURES_AT_MOST:
            raise scenario.refused(
                f"more than {FAILURES_AT_MOST:,} failures while {trainers.step} of {{steps}} were "
                "made, and no more are played; give more hours between failures, or the method "
                "'statistics', which leaves them to the run of {hours}"
            )

    for kind in kinds_of(scenario):
        env.process(
            fail_and_recover(env, scenario, kind, shards, stop_trainers, failing, count_one)
        )
    env.run(until=env.process(trainers.run()))
    trainers.noted.counts = _sum([client.counts for client in made])
    return trainers.noted


def _sum(counts: list[Counts]) -> Counts:
    return Counts(
        **{name: sum(getattr(count, name) for count in counts) for name in vars(Counts())}
    )


def events_per_step(scenario: Scenario) -> int:
    """About how many events a step takes."""
    groups = math.ceil(math.sqrt(scenario.shards)) if scenario.relayed else 0
    asked = scenario.trainers * (scenario.shards + groups)
    return 8 * scenario.searches_per_step * asked
