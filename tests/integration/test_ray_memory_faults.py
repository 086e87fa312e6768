"""Any process of a RayMemory may die at any moment: every epoch still seals or says why, and every
reply is whole and of one epoch."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from memory_server.actors.client import RayMemory
from memory_server.actors.launch import ServerSettings
from memory_server.actors.names import shard_name
from memory_server.errors import EpochNotSealed, UnknownEpoch
from tests.dying_coordinator import DyingCoordinator
from tests.integration.support_ray_memory import (
    WAIT_S,
    Stream,
    kill,
    kill_shard,
    pid_of,
    refreshed,
    slow,
)
from tests.ray_fixture import local_ray
from tests.toy_memory import expected_ids, toy_entries, toy_factory, toy_queries, toy_store
from tests.toy_memory import toy_weights as weights

pytestmark = pytest.mark.integration

ENTRIES = toy_entries(range(90))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RayMemory]]:
    """One memory for each number of replicas, because actors are slow to start."""
    store = toy_store(tmp_path_factory.mktemp("faults") / "store", ENTRIES)
    started: dict[int, RayMemory] = {}

    def begin(replicas: int) -> RayMemory:
        if replicas not in started:
            server = ServerSettings(
                shards=2,
                replicas=replicas,
                cpus_per_shard=0.25,
                coordinator=DyingCoordinator,
            )
            started[replicas] = RayMemory.start(
                store.path,
                shards=2,
                encoder=toy_factory,
                weights=weights(1),
                name=f"faults-{replicas}",
                server=server,
            )
        return started[replicas]

    with local_ray():
        yield begin
        for memory in started.values():
            memory.close()


def as_at_first(memory: RayMemory) -> RayMemory:
    """With one epoch, of the first weights."""
    live = refreshed(memory, encoder_step=0, weights=weights(1))
    for status in memory.held():
        if status.epoch != live:
            memory.release(status.epoch)
    return memory


@pytest.fixture
def memory(begun: Callable[[int], RayMemory]) -> RayMemory:
    return as_at_first(begun(1))


@pytest.fixture
def doubled(begun: Callable[[int], RayMemory]) -> RayMemory:
    """With two replicas of each shard."""
    return as_at_first(begun(2))


def answers_with(memory: RayMemory, seed: int, epoch: int | None = None) -> bool:
    queries = toy_queries(4)
    reply = memory.search(queries, 7, epoch=epoch)
    return reply.missing_shards == () and reply.ids.tolist() == expected_ids(
        ENTRIES, weights(seed), queries, 7
    )


def test_searches_do_not_need_the_coordinator_and_it_comes_back(memory: RayMemory) -> None:
    first = memory.info().epoch
    second = refreshed(memory, encoder_step=5, weights=weights(2))
    failed = memory.stage(encoder_step=6, weights=weights(3, width=3))
    pin = memory.pin(first, lease_s=WAIT_S)
    with Stream(memory, ENTRIES) as stream:
        dead = kill(memory.name)
        stream.wait_for(20)
        assert memory.info().epoch == second
        stream.wait_for(3)
    assert stream.check({second: weights(2)}) == {second}
    assert pid_of(memory.name) != dead
    # What it knew before it knows again: epochs, failures, and who reads what.
    while memory.staging(failed).state == "encoding":
        time.sleep(0.02)
    assert "width 3" in (memory.staging(failed).error or "")
    memory.release(first)
    assert answers_with(memory, 1, epoch=first)
    pin.renew()
    pin.close()
    with pytest.raises(UnknownEpoch):
        memory.search(toy_queries(1), 1, epoch=first)
    # And it goes on counting where it was.
    third = refreshed(memory, encoder_step=9, weights=weights(4))
    assert third > failed
    assert answers_with(memory, 4)


def test_the_coordinator_dies_before_the_shards_hear_of_a_switch(memory: RayMemory) -> None:
    first = memory.info().epoch
    second = memory.stage(encoder_step=5, weights=weights(2))
    memory.wait_sealed(second, WAIT_S)
    dead = pid_of(memory.name)
    with Stream(memory, ENTRIES) as stream:
        (Path(memory.layout.state_dir) / "die-at-activate").touch()
        assert memory.activate(second, expected_live=first) == second
        assert answers_with(memory, 2)
        stream.wait_for(3)
    assert stream.check({first: weights(1), second: weights(2)}) == {first, second}
    assert pid_of(memory.name) != dead
    assert memory.info().epoch == second


def test_the_coordinator_dies_before_the_shards_hear_of_an_epoch(memory: RayMemory) -> None:
    before = memory.info().epoch
    orders = [Path(memory.layout.state_dir) / f"die-at-{what}" for what in ("stage", "settle")]
    for order in orders:
        order.touch()
    number = memory.stage(encoder_step=5, weights=weights(2))
    memory.wait_sealed(number, WAIT_S)
    assert not any(order.exists() for order in orders)
    # The call that was repeated has staged one epoch, not two.
    assert [status.epoch for status in memory.held()] == [before, number]
    memory.activate(number)
    assert answers_with(memory, 2)
    (Path(memory.layout.state_dir) / "die-at-release").touch()
    memory.release(before)
    with pytest.raises(UnknownEpoch):
        memory.staging(before)
    deadline = time.monotonic() + WAIT_S
    while before in _held_by(memory):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_process_dies_while_an_epoch_is_staged(memory: RayMemory) -> None:
    first = memory.info().epoch
    second = refreshed(memory, encoder_step=5, weights=weights(2))
    third = memory.stage(encoder_step=6, weights=slow(weights(3)))
    with Stream(memory, ENTRIES) as stream:
        names = [memory.name, *memory.layout.host_names]
        dead = [kill(name) for name in names]
        stream.wait_for(3)
        assert memory.activate(_sealed(memory, third)) == third
        stream.wait_for(3)
    assert stream.check({second: weights(2), third: weights(3)}) == {second, third}
    assert not set(dead) & {pid_of(name) for name in names}
    assert answers_with(memory, 1, epoch=first)
    assert memory.stats().per_shard[1].restarts > 0


def _sealed(memory: RayMemory, epoch: int) -> int:
    memory.wait_sealed(epoch, WAIT_S)
    return epoch


@ray.remote(num_cpus=0)
class Client:
    """A trainer that attaches, and that a test may kill."""

    def __init__(self, name: str) -> None:
        self._memory = RayMemory.attach(name)

    def stage(self, seed: int, seconds: float) -> int:
        return self._memory.stage(encoder_step=seed, weights=slow(weights(seed), seconds))

    def pin(self, lease_s: float) -> int:
        self._pin = self._memory.pin(lease_s=lease_s)
        return self._pin.epoch


def test_a_client_dies_between_staging_and_activating(memory: RayMemory) -> None:
    first = memory.info().epoch
    client = Client.remote(memory.name)
    lost = ray.get(client.stage.remote(7, 0.5))
    assert ray.get(client.pin.remote(1.0)) == first
    ray.kill(client)
    # Its epoch seals without it, and another client may take it up.
    memory.wait_sealed(lost, WAIT_S)
    assert memory.info().epoch == first
    assert memory.activate(lost) == lost
    assert answers_with(memory, 7)
    # What it read is kept until its lease ends, and no longer.
    memory.release(first)
    deadline = time.monotonic() + WAIT_S
    while any(status.epoch == first for status in memory.held()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while first in _held_by(memory):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(UnknownEpoch):
        memory.search(toy_queries(1), 1, epoch=first)


def _held_by(memory: RayMemory) -> set[int]:
    """Epochs that shards answer from when they are asked for them."""
    held = set()
    for epoch in range(1, memory.info().epoch + 1):
        try:
            memory.search(toy_queries(1), 1, epoch=epoch)
        except (UnknownEpoch, EpochNotSealed):
            continue
        held.add(epoch)
    return held


def test_a_replica_dies_in_the_middle_of_searches_and_of_a_refresh(doubled: RayMemory) -> None:
    memory = doubled
    first = memory.info().epoch
    searching = RayMemory.attach(memory.name, deadline_s=20.0)
    with Stream(searching, ENTRIES) as stream:
        for replica in (0, 1):
            dead = kill_shard(memory, 0, replica)
            stream.wait_for(10)
            assert pid_of(shard_name(memory.name, 0, replica)) != dead
            stream.wait_for(3)
        second = memory.stage(encoder_step=5, weights=slow(weights(2), 0.3))
        kill_shard(memory, 1, 1)
        memory.wait_sealed(second, WAIT_S)
        kill_shard(memory, 1, 0)
        assert memory.activate(second) == second
        stream.wait_for(5)
    assert stream.check({first: weights(1), second: weights(2)}) == {first, second}
    searching.close()


@pytest.mark.slow
def test_after_a_switch_no_replica_answers_from_before_not_even_one_that_hung(
    doubled: RayMemory,
) -> None:
    memory = doubled
    hung = pid_of(shard_name(memory.name, 1, 1))
    epoch = memory.stage(encoder_step=5, weights=weights(2))
    memory.wait_sealed(epoch, WAIT_S)
    others = RayMemory.attach(memory.name)  # it is told of no switch
    others.search(toy_queries(1), 1)
    os.kill(hung, signal.SIGSTOP)
    assert memory.activate(epoch) == epoch
    # Whoever had been asked before the switch would go on with the old epoch now.
    with contextlib.suppress(ProcessLookupError):
        os.kill(hung, signal.SIGCONT)
    for _ in range(50):
        assert others.search(toy_queries(1), 1).epoch == epoch
    assert pid_of(shard_name(memory.name, 1, 1)) != hung
    others.close()


def test_an_edit_that_dies_with_its_client_is_rebased_by_another(memory: RayMemory) -> None:
    refresh = memory.stage(encoder_step=5, weights=weights(2))
    memory.wait_sealed(refresh, WAIT_S)
    edit = refreshed(memory, encoder_step=0, content_version=memory.info().content_version)
    assert edit != refresh
    (Path(memory.layout.state_dir) / "die-at-activate").touch()
    live = memory.activate(refresh)
    assert memory.info().epoch == live
    assert answers_with(memory, 2)


def test_stats_are_plain_and_tell_of_restarts(doubled: RayMemory) -> None:
    memory = doubled
    before = memory.stats()
    for _ in range(5):
        memory.search(toy_queries(3), 4)
    second = memory.stage(encoder_step=40, weights=weights(2))
    memory.wait_sealed(second, WAIT_S)
    pin = memory.pin()
    stats = memory.stats()
    assert json.loads(json.dumps(stats.as_dict()))["queries"] == stats.queries
    assert (
        stats.queries - before.queries >= 5 * 3 * 2
    )  # five searches, three rows, two shards; hedges come on top
    assert (stats.entries, stats.pins, stats.replicas) == (90, 1, 2)
    assert (stats.encoder_step, stats.newest_step, stats.staleness_steps) == (0, 40, 40)
    assert [(e.epoch, e.state, e.live, e.pins) for e in stats.epochs] == [
        (pin.epoch, "sealed", True, 1),
        (second, "sealed", False, 0),
    ]
    assert stats.bytes["keys"] == 2 * memory.info().bytes["keys"]
    assert [(s.shard, s.replica, s.state) for s in stats.per_shard] == [
        (shard, replica, "serving") for shard in (0, 1) for replica in (0, 1)
    ]
    counted = sum(shard.latency.count for shard in stats.per_shard)
    assert counted == sum(shard.requests for shard in stats.per_shard) > 0
    pin.close()
    dead = kill_shard(memory, 1, 1)
    name = shard_name(memory.name, 1, 1)
    assert pid_of(name) != dead
    restarts = [s.restarts for s in memory.stats().per_shard]
    assert restarts == [
        *(s.restarts for s in before.per_shard[:3]),
        before.per_shard[3].restarts + 1,
    ]
