"""Whole steps at once, from order statistics: for clusters of which single events are too many.

Every request still has its own arrival, its place in a replica's queue and its luck. What is
coarser than in `events`: replicas are chosen by lot, since within a step a client has no reason to
prefer one; the hedging delay is the p95 of all trainers together; when crowded relays begin is
found by repeated guessing; the shards of a relay that is given up are asked without hedges; cores
are never shared; nothing fails. Network cards are waited for in neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.simulation.draws import compute_draws
from cluster.simulation.queues import Ints, Queues, one_after_the_other
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes
from cluster.simulation.trainers import Noted
from memory_server.wire.fan_out import groups_of
from memory_server.wire.fan_out_asking import ALONE_AT_LEAST_S, RELAY_PATIENCE
from memory_server.wire.hedging import HEDGE_AT_LEAST_S, SAMPLES, SAMPLES_AT_LEAST

ROUNDS = 8  # of guessing when crowded relays begin; more change the figures no further


def draw_steps(scenario: Scenario, service: ServiceTimes) -> Noted:
    """Simulate `scenario.steps` steps; the same scenario, seed and times give the same result.

    Raises:
        ValueError: cores are shared.
    """
    if scenario.shared_cores:
        raise scenario.refused(
            "{shared_cores}: whole steps are drawn only where every process has cores of its own; "
            "use the method 'events'"
        )
    streams = np.random.SeedSequence(scenario.seed).spawn(2)
    computing, drawing = (np.random.default_rng(stream) for stream in streams)
    compute_s = compute_draws(scenario, service, computing)
    asked, noted = _Asked(scenario, service, drawing), Noted()
    refresh = _Refresh(scenario, asked.queues)
    for step in range(scenario.steps):
        stood_still = service.switch_s if refresh.boundary(step, noted) else 0.0
        computing_T = compute_s()
        at_T, found = np.full(scenario.trainers, stood_still), []
        for _ in range(scenario.searches_per_step):
            at_T = at_T + scenario.compute_before * computing_T / scenario.searches_per_step
            done_T = asked.search(at_T)
            found.append(done_T - at_T)
            at_T = done_T
        at_T = at_T + (1 - scenario.compute_before) * computing_T
        step_s = float(at_T.max()) + scenario.all_reduce_s
        noted.staleness.append(step - refresh.encoder_step)
        noted.step_s.append(step_s)
        noted.ideal_s.append(float(computing_T.max()) + scenario.all_reduce_s)
        noted.search_s.append(np.concatenate(found))
        saves = (step + 1) % scenario.checkpoint_every_steps == 0
        passed = step_s + (scenario.checkpoint_s if saves else 0.0)
        asked.queues.pass_time(passed)
        refresh.now += passed
        noted.seconds += passed
    noted.useful_steps = scenario.steps
    return noted


class _Refresh:
    """As `trainers.Trainers` has it."""

    def __init__(self, scenario: Scenario, queues: Queues) -> None:
        self._every, self._queues = scenario.refresh_every_steps, queues
        self.encoder_step = self._published_step = 0
        self._published_at: float | None = None
        self.now = 0.0

    def boundary(self, step: int, noted: Noted) -> bool:
        """Whether the epoch is switched before this step."""
        if not self._every:
            return False
        switched = False
        if self._published_at is not None and float(self._queues.encoded.max()) <= 0:
            noted.refreshes.append(self.now - self._published_at)
            self.encoder_step, self._published_at = self._published_step, None
            switched = True
        if self._published_at is None and step - self._published_step >= self._every:
            self._published_at, self._published_step = self.now, step
            self._queues.encode(0.0)
        return switched


class _Delay:
    """The p95 of recent answers, as `HedgeDelay` has it, of all clients together."""

    def __init__(self, trainers: int) -> None:
        self._at_least, self._most = SAMPLES_AT_LEAST * trainers, SAMPLES * trainers
        self._recent = np.empty(0)
        self.seconds = math.inf

    def record(self, latencies: Floats) -> None:
        """The answers of one search of all trainers."""
        self._recent = np.concatenate([self._recent, latencies.ravel()])[-self._most :]
        if len(self._recent) >= self._at_least:
            self.seconds = max(HEDGE_AT_LEAST_S, float(np.quantile(self._recent, 0.95)))


@dataclass
class _Requests:
    """Requests to shards: of which asker, when they were sent, and when their replies are back."""

    asker: Ints
    shard: Ints
    sent: Floats


class _Asked:
    """All trainers' searches of one moment, one after the other."""

    def __init__(
        self, scenario: Scenario, service: ServiceTimes, random: np.random.Generator
    ) -> None:
        self._scenario, self._service, self._random = scenario, service, random
        self.queues = Queues.idle(scenario, service)
        self._reply_s = max(service.reply_s(scenario.batch), scenario.wire_s)
        hop_s = scenario.latency_s + service.hop_s(scenario.batch)
        self._there_s, self._back_s = hop_s + scenario.request_wire_s, hop_s + scenario.wire_s
        self._hedge, self._relay = _Delay(scenario.trainers), _Delay(scenario.trainers)
        groups = groups_of(scenario.shards, scenario.asked_directly)
        self._first_G = np.array([group[0] for group in groups])
        self._size_G = np.array([len(group) for group in groups])

    def search(self, at_T: Floats) -> Floats:
        """When each trainer has its answer, if it asks then."""
        return self._relayed(at_T) if self._scenario.relayed else self._direct(at_T)

    def _direct(self, at_T: Floats) -> Floats:
        trainers, shards = self._scenario.trainers, self._scenario.shards
        sent_TS = at_T[:, None] + (1 + np.arange(shards)) * self._service.send_s
        requests = _Requests(
            asker=np.repeat(np.arange(trainers), shards),
            shard=np.tile(np.arange(shards), trainers),
            sent=sent_TS.ravel(),
        )
        done = self._asked(requests, at_T.copy())
        last_T: Floats = done.reshape(trainers, shards).max(1)
        return last_T

    def _asked(self, requests: _Requests, free: Floats) -> Floats:
        """When every reply is handled by its asker, hedges included."""
        scenario, seed = self._scenario, self._seed()
        chosen = self._replicas(len(requests.shard))
        queue, arrival = self._queue(requests.shard, chosen), requests.sent + self._there_s
        before, free_before = self.queues.copy(), free.copy()
        back = self.queues.serve(queue, arrival, seed) + self._back_s
        done = one_after_the_other(requests.asker, back, self._reply_s, free)
        delay_s = self._hedge_after_s
        slow = done - requests.sent > delay_s
        if slow.any():
            # Once more, with copies at another replica of each slow one.
            other = (chosen[slow] + 1 + self._others(int(slow.sum()))) % scenario.replicas
            copies = self._queue(requests.shard[slow], other)
            asked_again = requests.sent[slow] + delay_s + self._service.send_s + self._there_s
            self.queues = before
            both = self.queues.serve(
                np.concatenate([queue, copies]), np.concatenate([arrival, asked_again]), seed
            )
            back = both[: len(queue)] + self._back_s
            back[slow] = np.minimum(back[slow], both[len(queue) :] + self._back_s)
            free[:] = free_before
            done = one_after_the_other(requests.asker, back, self._reply_s, free)
        self._hedge.record(done - requests.sent)
        return done

    def _relayed(self, at_T: Floats) -> Floats:
        scenario, groups = self._scenario, len(self._size_G)
        sent_TG = at_T[:, None] + (1 + np.arange(groups)) * self._service.send_s
        sent = sent_TG.ravel()
        group = np.tile(np.arange(groups), scenario.trainers)
        ready = self._relays(group, sent + self._there_s)
        asker = np.repeat(np.arange(scenario.trainers), groups)
        free = at_T.copy()
        back = ready + self._back_s
        done = one_after_the_other(asker, back, self._reply_s, free)
        alone_s = 0.0 if scenario.replicas > 1 else ALONE_AT_LEAST_S
        patience_s = max(RELAY_PATIENCE * self._relay.seconds, alone_s)
        given_up = done - sent > patience_s
        self._relay.record((done - sent)[~given_up])
        if given_up.any():
            done[given_up] = self._directly(
                group[given_up], asker[given_up], sent[given_up] + patience_s, free
            )
        last_T: Floats = done.reshape(scenario.trainers, groups).max(1)
        return last_T

    def _relays(self, group: Ints, arrival: Floats) -> Floats:
        """When each relay has merged its group's replies."""
        scenario = self._scenario
        member = self._first_G[group] + (
            self._random.random(len(group)) * self._size_G[group]
        ).astype(np.int64)
        relay = self._queue(member, self._replicas(len(member)))
        order = np.lexsort((arrival, relay))
        _, first, counts = np.unique(relay[order], return_index=True, return_counts=True)
        turn = np.empty(len(order), np.int64)
        turn[order] = np.arange(len(order)) - np.repeat(first, counts)
        crowded = int(turn.max()) >= scenario.relays_at_once
        before, seed, start = self.queues.copy(), self._seed(), arrival
        replicas = self._replicas(int(self._size_G[group].sum()))
        took, done = np.zeros(len(group)), arrival
        # When a relay begins depends on how long those before it took, and that on when they began.
        for number in range(ROUNDS if crowded else 1):
            self.queues = before.copy()
            owner, requests = self._of_groups(group, relay, start)
            queue = self._queue(requests.shard, replicas)
            back = self.queues.serve(queue, requests.sent + self._there_s, seed) + self._back_s
            side_free = np.zeros(scenario.shards * scenario.replicas)
            handled = one_after_the_other(requests.asker, back, self._reply_s, side_free)
            done = np.full(len(group), -np.inf)
            np.maximum.at(done, owner, handled)
            took = done - start if number == 0 else (took + done - start) / 2
            start = self._begin(relay, turn, arrival, took)
        return done

    def _begin(self, relay: Ints, turn: Ints, arrival: Floats, took: Floats) -> Floats:
        """When relays begin of which each server runs a few at once, in the order of arrival."""
        scenario = self._scenario
        free = np.zeros((scenario.shards * scenario.replicas, scenario.relays_at_once))
        start = np.empty(len(relay))
        by_turn = np.argsort(turn, kind="stable")
        bounds = np.searchsorted(turn[by_turn], np.arange(int(turn.max()) + 2))
        for number in range(len(bounds) - 1):
            now = by_turn[bounds[number] : bounds[number + 1]]
            slot = free[relay[now]].argmin(1)
            start[now] = np.maximum(arrival[now], free[relay[now], slot])
            free[relay[now], slot] = start[now] + took[now]
        return start

    def _directly(self, group: Ints, asker: Ints, at: Floats, free: Floats) -> Floats:
        """The groups' shards, asked one by one; when the last of each has answered."""
        owner, requests = self._of_groups(group, asker, at)
        back = self._served(requests)
        handled = one_after_the_other(requests.asker, back, self._reply_s, free)
        done = np.full(len(group), -np.inf)
        np.maximum.at(done, owner, handled)
        return done

    def _of_groups(self, group: Ints, asker: Ints, at: Floats) -> tuple[Ints, _Requests]:
        """(to which of the groups a request belongs, the requests to all of their shards)."""
        sizes = self._size_G[group]
        owner = np.repeat(np.arange(len(group)), sizes)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return owner, _Requests(
            asker=asker[owner],
            shard=self._first_G[group][owner] + number,
            sent=at[owner] + (1 + number) * self._service.send_s,
        )

    def _served(self, requests: _Requests) -> Floats:
        queue = self._queue(requests.shard, self._replicas(len(requests.shard)))
        return self.queues.serve(queue, requests.sent + self._there_s, self._seed()) + self._back_s

    def _queue(self, shard: Ints, replica: Ints) -> Ints:
        return shard * self._scenario.replicas + replica

    def _replicas(self, count: int) -> Ints:
        return self._random.integers(self._scenario.replicas, size=count, dtype=np.int64)

    def _others(self, count: int) -> Ints:
        return self._random.integers(self._scenario.replicas - 1, size=count, dtype=np.int64)

    @property
    def _hedge_after_s(self) -> float:
        scenario = self._scenario
        if not scenario.hedges:
            return math.inf
        return self._hedge.seconds if isinstance(scenario.hedge, str) else scenario.hedge

    def _seed(self) -> int:
        return int(self._random.integers(1 << 62))
