"""Trainers as events: compute, search, wait for the slowest, reduce, and switch epochs together.

As `trainer.loop` and `trainer.follower` have it: rank 0 decides at the boundary between two steps,
publishes weights when they are due and none are on their way, and switches when every shard has
made its keys. A trainer's death takes all of them back to the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy

from cluster.simulation.clients import Client, Counts
from cluster.simulation.network import search
from cluster.simulation.parts import Cores, Process, Replica
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes


@dataclass
class Noted:
    """What happened, step by step and search by search, in seconds.

    Attributes:
        step_s: of every finished step, boundary included; ideal_s: of the same step, had its
            searches taken no time.
        search_s: of every search.
        staleness: steps between the keys' weights and the step that used them.
        refreshes: seconds from publishing weights to the switch.
        failures: of anything; restarts: of the trainers.
        seconds: of the whole simulation; useful_steps: what is left when steps that were made
            again count once.
    """

    step_s: list[float] = field(default_factory=list)
    ideal_s: list[float] = field(default_factory=list)
    search_s: list[Floats] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)
    failures: int = 0
    restarts: int = 0
    seconds: float = 0.0
    useful_steps: int = 0
    counts: Counts = field(default_factory=Counts)


class Trainers:
    """All trainers of a run. `failed` is what a failure triggers."""

    def __init__(
        self,
        env: simpy.Environment,
        scenario: Scenario,
        service: ServiceTimes,
        shards: Sequence[Sequence[Replica]],
        clients: Callable[[], list[Client]],
        compute_s: Callable[[], Floats],
        *,
        cores: Cores,
    ) -> None:
        """
        Args:
            clients: new ones, one for each trainer, as after a start.
            compute_s: draws the trainers' computing seconds of one step.
        """
        self._env, self._scenario, self._service = env, scenario, service
        self._shards, self._new_clients, self._compute_s = shards, clients, compute_s
        self._cores = cores
        self._clients = clients()
        self.failed = env.event()
        self.noted = Noted()
        self.step = 0
        self._encoder_step = self._published_step = 0
        self._published_at: float | None = None

    def run(self) -> Process:
        """All steps; a simpy process."""
        scenario, noted = self._scenario, self.noted
        saved = 0
        while self.step < scenario.steps:
            began = self._env.now
            if self._switches():
                yield self._env.timeout(self._service.switch_s)
            computing = self._compute_s()
            found: list[float] = []
            trainers = [
                self._env.process(self._one(client, float(seconds), found))
                for client, seconds in zip(self._clients, computing, strict=True)
            ]
            yield simpy.AnyOf(self._env, [simpy.AllOf(self._env, trainers), self.failed])
            if not self.failed.triggered:
                yield self._env.timeout(scenario.all_reduce_s)
            if self.failed.triggered:
                yield self._env.timeout(float(self.failed.value or 0) + scenario.trainers_back_s)
                # Failures while all of them start are a part of that start.
                self.failed = self._env.event()
                noted.restarts += 1
                self.step = saved
                self._clients = self._new_clients()
                continue
            noted.staleness.append(self.step - self._encoder_step)
            noted.step_s.append(self._env.now - began)
            noted.ideal_s.append(float(computing.max()) + scenario.all_reduce_s)
            noted.search_s.append(np.array(found))
            self.step += 1
            if self.step % scenario.checkpoint_every_steps == 0:
                yield self._env.timeout(scenario.checkpoint_s)
                saved = self.step
        noted.seconds, noted.useful_steps = self._env.now, self.step

    def _one(self, client: Client, compute_s: float, found: list[float]) -> Process:
        """One trainer's part of a step."""
        scenario = self._scenario
        before_s = scenario.compute_before * compute_s / scenario.searches_per_step
        for _ in range(scenario.searches_per_step):
            yield self._cores.work(before_s)
            began = self._env.now
            yield from search(client)
            found.append(self._env.now - began)
        yield self._cores.work((1 - scenario.compute_before) * compute_s)

    def _switches(self) -> bool:
        """Between two steps: switch to keys that are ready, and publish weights that are due."""
        every, switched = self._scenario.refresh_every_steps, False
        if not every:
            return False
        if self._published_at is not None and self._all_encoded():
            self.noted.refreshes.append(self._env.now - self._published_at)
            self._encoder_step, self._published_at = self._published_step, None
            switched = True
        if self._published_at is None and self.step - self._published_step >= every:
            self._published_at, self._published_step = self._env.now, self.step
            for replicas in self._shards:
                for replica in replicas:
                    replica.encode()
        return switched

    def _all_encoded(self) -> bool:
        """Every shard has the new keys; a replica that is down gets them when it comes up."""
        return all(
            any(replica.encoded() for replica in replicas)
            and all(replica.encoded() for replica in replicas if replica.up)
            for replicas in self._shards
        )
