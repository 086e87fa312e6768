"""What fails and comes back: as events beside single steps, and over the hours of a whole run.

Times between failures are exponential. Over hours single steps do not matter, so `long_run` lets
training move evenly between two failures; what it keeps exactly is who is down, since when, and
which steps are lost. A shard whose replicas are all down stops the step until one is back; a
trainer's death costs new keys, the start of new trainers and the steps since the last checkpoint.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import simpy

from cluster.simulation.parts import Process, Replica
from cluster.simulation.scenario import HOUR_S, Scenario


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of what fails: how many there are, and how often one of them does."""

    name: str
    members: int
    mtbf_s: float

    @property
    def rate(self) -> float:
        """Failures per second of all together, 0 for what never fails."""
        return self.members / self.mtbf_s if self.mtbf_s else 0.0

    @property
    def option(self) -> str:
        """The scenario's field that says how often."""
        return f"{self.name.replace(' ', '_')}_mtbf_h"


def kinds_of(scenario: Scenario) -> tuple[Kind, ...]:
    """Everything that fails in a scenario."""
    memory_nodes = scenario.replicas * math.ceil(scenario.shards / scenario.shards_per_node)
    trainer_nodes = math.ceil(scenario.trainers / scenario.trainers_per_node)
    told = (
        ("replica", scenario.replicas * scenario.shards, scenario.replica_mtbf_h),
        ("memory node", memory_nodes, scenario.memory_node_mtbf_h),
        ("trainer", scenario.trainers, scenario.trainer_mtbf_h),
        ("trainer node", trainer_nodes, scenario.trainer_node_mtbf_h),
    )
    return tuple(
        Kind(name=name, members=members, mtbf_s=hours * HOUR_S)
        for name, members, hours in told
        if hours
    )


def victims(scenario: Scenario, kind: str, member: int) -> list[tuple[int, int]]:
    """The replicas (shard, number) that go with a replica's process or a node of shards.

    A node holds replicas of one number, of neighbouring shards: those of one shard are on
    different nodes, as `memory_server.actors.places` puts them.
    """
    if kind == "replica":
        return [divmod(member, scenario.replicas)]
    nodes = math.ceil(scenario.shards / scenario.shards_per_node)
    replica, node = divmod(member, nodes)
    first = node * scenario.shards_per_node
    last = min(scenario.shards, first + scenario.shards_per_node)
    return [(shard, replica) for shard in range(first, last)]


def fail_and_recover(
    env: simpy.Environment,
    scenario: Scenario,
    kind: Kind,
    shards: Sequence[Sequence[Replica]],
    stop_trainers: Callable[[float], None],
    random: np.random.Generator,
    count_one: Callable[[], None],
) -> Process:
    """A simpy process in which the members of one kind fail again and again.

    `stop_trainers` is told how long the failure of one of them stays unnoticed; `count_one` is
    called at each failure.
    """
    while True:
        yield env.timeout(float(random.exponential(1 / kind.rate)))
        count_one()
        member = int(random.integers(kind.members))
        if kind.name.startswith("trainer"):
            stop_trainers(scenario.detection_s if kind.name == "trainer node" else 0.0)
            continue
        struck = [shards[s][r] for s, r in victims(scenario, kind.name, member)]
        struck = [replica for replica in struck if replica.up]
        node = kind.name == "memory node"
        for replica in struck:
            replica.fail(silent=node)
        back_s = scenario.replica_back_s + (scenario.detection_s if node else 0.0)
        env.process(_recover_after(env, back_s, struck))


def _recover_after(env: simpy.Environment, seconds: float, struck: list[Replica]) -> Process:
    yield env.timeout(seconds)
    for replica in struck:
        replica.recover()


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """Some hours of training with failures.

    Attributes:
        seconds: of the run; useful_steps: that it made; share: of the steps that it would have
            made without failures and checkpoints.
        failures: by kind. stopped_s: training waited for shards; restarting_s: for new trainers;
            steps_again: that were lost and made again.
    """

    seconds: float
    useful_steps: float
    share: float
    failures: dict[str, int]
    stopped_s: float
    restarting_s: float
    steps_again: float


def long_run(scenario: Scenario, step_s: float, random: np.random.Generator) -> LongRun:
    """Follow `scenario.hours` of a run whose steps take so long while nothing fails.

    Raises:
        ValueError: a step takes no time.
    """
    if step_s <= 0:
        raise scenario.refused(
            f"step_s={step_s}: a step must take some time; give {{compute_s:name}} above 0"
        )
    run = _Run(scenario, step_s, random)
    return run.to(scenario.hours * HOUR_S)


class _Run:
    def __init__(self, scenario: Scenario, step_s: float, random: np.random.Generator) -> None:
        self._scenario, self._step_s, self._random = scenario, step_s, random
        self._now = self._stopped_s = self._restarting_s = 0.0
        self._again = self._restarting_until = 0.0
        # Steps since the checkpoint, which is due after `every`, and those that are safe.
        self._since = self._safe = self._saving_s = 0.0
        self._down: dict[tuple[int, int], int] = {}
        self._missing = [0] * scenario.shards
        self._lost_shards = 0
        self._failures: dict[str, int] = {}
        self._order = count()

    def to(self, end: float) -> LongRun:
        kinds = kinds_of(self._scenario)
        events: list[tuple[float, int, str, list[tuple[int, int]]]] = []
        by_name = {kind.name: kind for kind in kinds}

        def push(at: float, what: str, replicas: list[tuple[int, int]]) -> None:
            heapq.heappush(events, (at, next(self._order), what, replicas))

        for kind in kinds:
            push(self._random.exponential(1 / kind.rate), kind.name, [])
        while events and events[0][0] < end:
            at, _, what, replicas = heapq.heappop(events)
            self._advance(at)
            if what == "back":
                self._come_back(replicas)
                continue
            kind = by_name[what]
            push(at + self._random.exponential(1 / kind.rate), what, [])
            self._failures[what] = self._failures.get(what, 0) + 1
            if what.startswith("trainer"):
                # A death while others start anew begins that start again.
                self._lose_steps()
                node = what == "trainer node"
                wait_s = self._scenario.trainers_back_s
                wait_s += self._scenario.detection_s if node else 0.0
                self._restarting_until = at + wait_s
                continue
            member = int(self._random.integers(kind.members))
            gone = [r for r in victims(self._scenario, what, member) if r not in self._down]
            self._go_down(gone)
            node_s = self._scenario.detection_s if what == "memory node" else 0.0
            push(at + self._scenario.replica_back_s + node_s, "back", gone)
        self._advance(end)
        useful = self._safe + self._since
        return LongRun(
            seconds=end,
            useful_steps=useful,
            share=useful * self._step_s / end if end else 1.0,
            failures=self._failures,
            stopped_s=self._stopped_s,
            restarting_s=self._restarting_s,
            steps_again=self._again,
        )

    def _advance(self, until: float) -> None:
        """Train, or wait, until then."""
        starting = min(until, max(self._now, self._restarting_until))
        self._restarting_s += starting - self._now
        self._now = starting
        left = until - self._now
        self._now = until
        if self._lost_shards:
            self._stopped_s += left
            return
        every, save_s = self._scenario.checkpoint_every_steps, self._scenario.checkpoint_s
        # The checkpoint that an event interrupted, then whole rounds, then a part of one.
        self._train(left, every, save_s)

    def _train(self, left: float, every: int, save_s: float) -> None:
        if self._saving_s:
            took = min(left, self._saving_s)
            self._saving_s -= took
            left -= took
            if self._saving_s > 0:
                return
            self._commit(every)
        rest_s = (every - self._since) * self._step_s
        if left < rest_s:
            self._since += left / self._step_s
            return
        left -= rest_s
        self._since = float(every)
        if left < save_s:
            self._saving_s = save_s - left
            return
        left -= save_s
        self._commit(every)
        rounds, left = divmod(left, every * self._step_s + save_s)
        self._safe += rounds * every
        if left < every * self._step_s:
            self._since = left / self._step_s
        else:
            self._since = float(every)
            self._saving_s = save_s - (left - every * self._step_s)

    def _commit(self, every: int) -> None:
        self._safe += every
        self._since = self._saving_s = 0.0

    def _lose_steps(self) -> None:
        self._again += self._since
        self._since = self._saving_s = 0.0

    def _go_down(self, replicas: list[tuple[int, int]]) -> None:
        for shard, replica in replicas:
            self._down[shard, replica] = 1
            self._missing[shard] += 1
            self._lost_shards += self._missing[shard] == self._scenario.replicas

    def _come_back(self, replicas: list[tuple[int, int]]) -> None:
        for shard, replica in replicas:
            del self._down[shard, replica]
            self._lost_shards -= self._missing[shard] == self._scenario.replicas
            self._missing[shard] -= 1
