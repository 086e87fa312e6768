"""Those who search, as events: what one process knows of the replicas, counts and spends."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy

from cluster.simulation.parts import Cores, Process, Replica, after
from cluster.simulation.scenario import Scenario
from memory_server.wire.hedging import HedgeDelay, ReplicaBook

NEVER_S = 1e9


@dataclass
class Counts:
    """Of one client, over all of its searches."""

    asked: int = 0
    hedged: int = 0
    hedges_won: int = 0
    relayed: int = 0
    relays_failed: int = 0
    repeated: int = 0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the asker, per request and per reply of the scenario's batch; hop_s: one way of
    either, less the network's part."""

    send_s: float
    reply_s: float
    hop_s: float


class Client:
    """What one process knows of the replicas, and how its messages travel."""

    def __init__(
        self,
        env: simpy.Environment,
        scenario: Scenario,
        shards: Sequence[Sequence[Replica]],
        costs: Costs,
        *,
        cores: Cores,
        lot: random.Random,
        patient: bool = True,
    ) -> None:
        """`shards[s]` are the replicas of shard s that are asked; patient: waits for lost ones."""
        self.env, self.scenario, self.shards, self.costs = env, scenario, shards, costs
        self.cores, self.lot, self.patient, self.counts = cores, lot, patient, Counts()
        self.book = ReplicaBook([len(replicas) for replicas in shards], lot=lot.random)
        self.hedge_delay = HedgeDelay(NEVER_S if scenario.hedge == "off" else scenario.hedge)
        self.relay_delay = HedgeDelay("p95")

    def travel(self, wire_s: float, arrive: Callable[[], object]) -> None:
        """A message goes from one process to another."""
        if not self.scenario.shared_cores:
            after(self.env, self.scenario.latency_s + wire_s + self.costs.hop_s, arrive)
            return

        # Packing, sockets and waking up are work for the cores that all share.
        def go() -> Process:
            yield from self.journey(wire_s)
            arrive()

        self.env.process(go())

    def journey(self, wire_s: float) -> Process:
        """The same, for a process that waits for it."""
        yield self.env.timeout(self.scenario.latency_s + wire_s)
        yield self.cores.work(self.costs.hop_s)
