"""One search, as events: as `memory_server.wire` asks, hedges, relays, asks again and merges.

Which replica is asked and when a second one is are decided by the memory's own code, `ReplicaBook`
and `HedgeDelay`; groups are cut as it cuts them. What is left out: deadlines, and the degraded
answers of `on_lost_shard = "degrade"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from cluster.simulation.clients import NEVER_S, Client
from cluster.simulation.parts import Process, Replica, Word, after
from memory_server.wire.fan_out import groups_of
from memory_server.wire.fan_out_asking import ALONE_AT_LEAST_S, RELAY_PATIENCE
from memory_server.wire.fan_out_call import LONGEST_BACKOFF_S
from memory_server.wire.fan_out_tasks import FIRST_BACKOFF_S


class _LostInGroup(Exception):
    """A relay does not wait for a shard that is down: its client does."""


@dataclass(frozen=True)
class _Attempt:
    """Whom a request went to, which life of its process, and when."""

    replica: int
    life: int
    sent_at: float
    hedge: bool = False


@dataclass
class _Task:
    """A shard to be asked, or (with a group) several by way of a relay."""

    group: tuple[int, ...]
    relay: bool
    open: bool = True
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    backoff_s: float = FIRST_BACKOFF_S


def search(client: Client, *, relayed: bool | None = None) -> Process:
    """A process that ends when all shards have answered."""
    use_relays = client.scenario.relayed if relayed is None else relayed
    fan_in = client.scenario.asked_directly if use_relays else len(client.shards)
    yield from _Call(client).ask(groups_of(len(client.shards), fan_in))


class _Call:
    """One search. Numbers tell its attempts apart; messages come in at `inbox`."""

    def __init__(self, client: Client) -> None:
        self._client, self._env = client, client.env
        self._inbox: simpy.Store = simpy.Store(client.env)
        self._numbers = 0
        self._tasks: list[_Task] = []
        self._of: dict[int, _Task] = {}

    def ask(self, groups: Sequence[tuple[int, ...]]) -> Process:
        """Until every shard has answered."""
        self._tasks = [_Task(group, relay=len(group) > 1) for group in groups]
        for task in list(self._tasks):
            yield from self._start(task)
        while any(task.open for task in self._tasks):
            kind, task, number, word = yield self._inbox.get()
            if not task.open:
                continue
            if kind == "hedge":
                yield from self._hedge(task)
            elif kind == "impatient":
                yield from self._ask_directly(task)
            elif kind == "again":
                yield from self._start(task)
            elif number in task.attempts:
                yield from self._answered(task, number, word)

    def _start(self, task: _Task) -> Process:
        if task.relay:
            yield from self._start_relay(task)
            return
        client, (shard,) = self._client, task.group
        usable = [
            r for r, replica in enumerate(client.shards[shard]) if replica.up or replica.silent
        ]
        if not usable:
            if not client.patient:
                raise _LostInGroup
            self._look_when_back(task, shard)
            return
        untried = [r for r in usable if r not in task.tried]
        if not untried:
            task.tried.clear()
        replica = client.book.choose(shard, untried or usable, self._env.now)
        yield from self._send(task, replica)
        others = [r for r in usable if r != replica]
        if others:
            probe = client.book.probe(shard, others, self._env.now)
            if probe is not None:
                yield from self._send(task, probe)
            if client.hedge_delay.seconds < NEVER_S:
                self._later(client.hedge_delay.seconds, ("hedge", task, 0, "answer"))

    def _send(self, task: _Task, replica: int, *, hedge: bool = False) -> Process:
        client, (shard,) = self._client, task.group
        self._numbers += 1
        number = self._numbers
        yield client.cores.work(client.costs.send_s)
        target = client.shards[shard][replica]
        task.attempts[number] = _Attempt(replica, target.life, self._env.now, hedge)
        client.book.sent(shard, replica)
        client.counts.asked += 1
        rows = client.scenario.batch

        def heard(word: Word) -> None:
            wire_s = client.scenario.wire_s if word == "answer" else 0.0
            client.travel(wire_s, lambda: self._inbox.put(("reply", task, number, word)))

        client.travel(client.scenario.request_wire_s, lambda: target.ask(rows, heard))
        if client.scenario.memory_node_mtbf_h:
            # Only a node that is lost keeps silent; its heartbeats are missed after a while.
            timeout_s = client.scenario.heartbeat_timeout_s
            self._later(timeout_s, ("reply", task, number, "silent"))

    def _hedge(self, task: _Task) -> Process:
        client, (shard,) = self._client, task.group
        asked = {attempt.replica for attempt in task.attempts.values()}
        if len(asked) != 1:
            return
        (first,) = asked
        usable = [r for r, replica in enumerate(client.shards[shard]) if replica.up]
        other = client.book.less_busy(shard, first, usable, self._env.now)
        if other is not None:
            client.counts.hedged += 1
            yield from self._send(task, other, hedge=True)

    def _answered(self, task: _Task, number: int, word: str) -> Process:
        client, now = self._client, self._env.now
        attempt = task.attempts[number]
        replica, sent_at = attempt.replica, attempt.sent_at
        if word == "silent":
            asked = client.shards[task.group[0]][replica]
            if asked.up and asked.life == attempt.life:
                return  # it is only slow
            word = "lost"
        del task.attempts[number]
        if task.relay:
            if word != "answer":
                yield from self._ask_directly(task)
                return
            client.counts.relayed += 1
            client.relay_delay.record(now - sent_at)
        else:
            (shard,) = task.group
            if word == "lost":
                client.book.lost(shard, replica, now)
            else:
                client.book.answered(shard, replica, now - sent_at, now)
            if word != "answer":
                self._again(task, replica, word)
                return
            client.hedge_delay.record(now - sent_at)
            client.counts.hedges_won += attempt.hedge
        task.open = False
        self._abandon(task)
        yield client.cores.work(client.costs.reply_s)

    def _abandon(self, task: _Task) -> None:
        now = self._env.now
        for attempt in task.attempts.values():
            if not task.relay:
                self._client.book.abandoned(
                    task.group[0], attempt.replica, now - attempt.sent_at, now
                )
        task.attempts.clear()

    def _again(self, task: _Task, replica: int, word: str) -> None:
        if task.attempts:
            return  # a copy is on its way
        client, (shard,) = self._client, task.group
        client.counts.repeated += 1
        pause_s = 0.0
        if word == "overloaded":
            task.tried.add(replica)
            up = {r for r, other in enumerate(client.shards[shard]) if other.up}
            if not up - task.tried:
                task.tried.clear()
                pause_s = client.lot.uniform(0.5, 1.0) * task.backoff_s
                task.backoff_s = min(2 * task.backoff_s, LONGEST_BACKOFF_S)
        self._later(pause_s, ("again", task, 0, "answer"))

    def _look_when_back(self, task: _Task, shard: int) -> None:
        def wait() -> Process:
            yield simpy.AnyOf(self._env, [replica.back for replica in self._client.shards[shard]])
            self._inbox.put(("again", task, 0, "answer"))

        self._env.process(wait())

    def _start_relay(self, task: _Task) -> Process:
        client = self._client
        members = []
        for shard in task.group:
            usable = [r for r, replica in enumerate(client.shards[shard]) if replica.up]
            if not usable:
                yield from self._ask_directly(task, failed=False)
                return
            chosen = client.book.choose(shard, usable, self._env.now)
            members.append(client.shards[shard][chosen])
        relay = members[client.lot.randrange(len(members))]
        self._numbers += 1
        number = self._numbers
        yield client.cores.work(client.costs.send_s)
        task.attempts[number] = _Attempt(0, relay.life, self._env.now)
        client.counts.asked += 1
        hedged = len(client.shards[task.group[0]]) > 1
        patience_s = max(
            RELAY_PATIENCE * client.relay_delay.seconds, 0.0 if hedged else ALONE_AT_LEAST_S
        )
        if patience_s < NEVER_S:
            self._later(patience_s, ("impatient", task, number, "answer"))
        self._env.process(self._relayed(task, number, relay, members))

    def _relayed(
        self, task: _Task, number: int, relay: Replica, members: Sequence[Replica]
    ) -> Process:
        """At the relay: one of its few threads asks the group, once each, and merges."""
        client, life, word = self._client, relay.life, "answer"
        yield from self._client.journey(self._client.scenario.request_wire_s)
        if relay.up:
            with relay.relays.request() as slot:
                yield slot
                group = Client(
                    self._env,
                    client.scenario,
                    [[member] for member in members],
                    client.costs,
                    cores=relay.side_cores,
                    lot=client.lot,
                    patient=False,
                )
                try:
                    yield from search(group, relayed=False)
                except _LostInGroup:
                    word = "lost"
            yield from client.journey(client.scenario.wire_s)
        if relay.life != life or not relay.up:
            word = "lost"
            if relay.silent:
                yield self._env.timeout(client.scenario.heartbeat_timeout_s)
        self._inbox.put(("reply", task, number, word))

    def _ask_directly(self, task: _Task, *, failed: bool = True) -> Process:
        if not task.relay:
            return
        self._client.counts.relays_failed += failed
        task.open = False
        task.attempts.clear()
        singles = [_Task((shard,), relay=False) for shard in task.group]
        self._tasks += singles
        for single in singles:
            yield from self._start(single)

    def _later(self, seconds: float, message: tuple[str, _Task, int, Any]) -> None:
        after(self._env, seconds, lambda: self._inbox.put(message))
