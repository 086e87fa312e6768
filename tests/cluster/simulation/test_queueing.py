"""The parts against queueing theory: waiting, fan-out, shared cores, joined searches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import simpy

from cluster.simulation.parts import Cores, Process, Replica, ReplicaSettings, Word
from cluster.simulation.queues import Queues, one_after_the_other
from cluster.simulation.scenario import Scenario
from tests.cluster.simulation.made_up import service_times

SERVICE_S, SEARCHES = 0.01, 100_000


def replica(env: simpy.Environment, search_s: Callable[[int], float], **settings: int) -> Replica:
    whole = {"queue_limit": 10**6, "max_batch_rows": 1, "relays_at_once": 1} | settings
    made = ReplicaSettings(search_s=search_s, **whole)
    return Replica(env, made, Cores(env), Cores(env, 1))


def mean_wait(search_s: Callable[[int], float], load: float) -> float:
    """Of searches that come at random to one replica that joins none."""
    env, random = simpy.Environment(), np.random.default_rng(3)
    server = replica(env, search_s)
    took: list[float] = []

    def come() -> Process:
        for gap in random.exponential(SERVICE_S / load, SEARCHES):
            yield env.timeout(gap)
            began = env.now
            server.ask(1, lambda word, began=began: took.append(env.now - began))

    env.process(come())
    env.run()
    assert len(took) == SEARCHES
    return float(np.mean(took)) - SERVICE_S


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_random_services_wait_as_an_m_m_1_queue(load: float) -> None:
    random = np.random.default_rng(4)
    wait_s = mean_wait(lambda rows: float(random.exponential(SERVICE_S)), load)
    assert wait_s == pytest.approx(SERVICE_S * load / (1 - load), rel=0.04)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_equal_services_wait_as_an_m_d_1_queue(load: float) -> None:
    wait_s = mean_wait(lambda rows: SERVICE_S, load)
    assert wait_s == pytest.approx(SERVICE_S * load / (2 * (1 - load)), rel=0.04)


def test_arrays_make_a_queue_wait_as_theory_has_it() -> None:
    random = np.random.default_rng(5)
    count = 60_000
    exponential = -np.log((np.arange(20_000) + 0.5) / 20_000)  # its quantiles, not a sample
    arrival = np.cumsum(random.exponential(SERVICE_S / 0.5, count))
    scenario = Scenario(shards=1, batch=1, max_batch_rows=1, queue_limit=10**6, entries=1000)
    for spread, expected in (([1.0], 0.5), (exponential, 1.0)):
        times = service_times(search_s=SERVICE_S, spread=list(spread))
        queues = Queues.idle(scenario, times)
        queue = np.zeros(count, np.int64)
        wait_s = queues.serve(queue, arrival, seed=1) - arrival
        assert float(wait_s.mean()) - SERVICE_S == pytest.approx(expected * SERVICE_S, rel=0.05)


def test_the_slowest_of_exponential_shards_takes_the_harmonic_number() -> None:
    """Each shard alone takes 1 on average; all n together 1 + 1/2 + ... + 1/n."""
    shards, random = 16, np.random.default_rng(6)
    scenario = Scenario(shards=shards, batch=1, entries=1000)
    times = service_times(search_s=1.0, spread=list(random.exponential(size=50_000)))
    slowest = [
        float(Queues.idle(scenario, times).serve(np.arange(shards), np.zeros(shards), seed=n).max())
        for n in range(4000)
    ]
    harmonic = sum(1 / n for n in range(1, shards + 1))
    assert np.mean(slowest) == pytest.approx(harmonic, rel=0.02)


def test_searches_that_wait_are_answered_together_up_to_the_limit() -> None:
    env = simpy.Environment()
    rows_asked: list[int] = []

    def search_s(rows: int) -> float:
        rows_asked.append(rows)
        return 1.0

    server = replica(env, search_s, max_batch_rows=30)
    answers: list[tuple[float, Word]] = []
    for _ in range(6):
        server.ask(10, lambda word: answers.append((env.now, word)))
        env.run(until=env.now + 0.001)
    env.run()
    assert rows_asked == [10, 30, 20]
    assert [round(at) for at, _ in answers] == [1, 2, 2, 2, 3, 3]
    assert (server.searches, server.joined) == (3, 2)


def test_a_full_queue_refuses_and_a_dead_replica_loses_what_it_had() -> None:
    env = simpy.Environment()
    server = replica(env, lambda rows: 1.0, queue_limit=2)
    words: list[Word] = []
    for _ in range(4):
        server.ask(1, words.append)
        env.run(until=env.now + 0.001)
    assert words == ["overloaded"]  # one is being searched, two wait
    server.fail(silent=False)
    assert words == ["overloaded", "lost", "lost", "lost"]
    server.ask(1, words.append)
    assert words[-1] == "lost"
    server.recover()
    server.ask(1, words.append)
    env.run()
    assert words[-1] == "answer"


def test_a_node_that_is_lost_says_nothing() -> None:
    env = simpy.Environment()
    server = replica(env, lambda rows: 1.0)
    words: list[Word] = []
    server.ask(1, words.append)
    env.run(until=0.5)
    server.fail(silent=True)
    server.ask(1, words.append)
    env.run()
    assert words == []


def test_cores_are_shared_evenly() -> None:
    """Two cores and three at work: each gets on at two thirds of its speed."""
    env = simpy.Environment()
    cores, done = Cores(env, 2), {}

    def work(name: str, start: float, seconds: float) -> Process:
        yield env.timeout(start)
        yield cores.work(seconds)
        done[name] = env.now

    for name, start, seconds in (("a", 0, 2), ("b", 0, 2), ("c", 0, 2), ("late", 10, 1)):
        env.process(work(name, start, seconds))
    env.run()
    assert done == pytest.approx({"a": 3.0, "b": 3.0, "c": 3.0, "late": 11.0})


def test_keys_are_made_more_slowly_while_searches_run() -> None:
    env = simpy.Environment()
    settings = ReplicaSettings(
        search_s=lambda rows: 1.0,
        queue_limit=9,
        max_batch_rows=1,
        relays_at_once=1,
        encode_s=10.0,
        refresh_slowdown=2.0,
        encode_share=0.25,
    )
    server = Replica(env, settings, Cores(env), Cores(env, 1))
    server.encode()
    answered: list[float] = []
    server.ask(1, lambda word: answered.append(env.now))
    env.run(until=11.4)
    assert answered == [2.0]  # twice as long as without the refresh
    assert not server.encoded()  # of these two seconds, only a quarter went to the keys
    env.run(until=11.6)
    assert server.encoded()


def test_messages_are_handled_one_after_the_other() -> None:
    who, free = np.array([0, 1, 0, 0]), np.zeros(2)
    ready = np.array([1.0, 5.0, 1.0, 9.0])
    done = one_after_the_other(who, ready, 2.0, free)
    assert sorted(done[who == 0]) == [3.0, 5.0, 11.0]
    assert done[1] == 7.0
    assert list(free) == [11.0, 7.0]
