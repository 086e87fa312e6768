"""RayMemory when things go wrong: killed shards, deadlines, failed starts; and who may end it."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
import torch
from torch import Tensor

from memory_server.actors.client import RayMemory
from memory_server.actors.names import NAMESPACE, shard_name
from memory_server.api import KeyEncoder, Retrieved
from memory_server.errors import CoordinatorLost, MemoryServerError, RefreshFailed, ShardLost
from tests.ray_fixture import local_ray
from tests.toy_memory import (
    KEY_WIDTH,
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
)

pytestmark = pytest.mark.integration

ENTRIES = toy_entries(range(90))
NAME = "faults"


def shard_pid(shard: int, name: str = NAME) -> int:
    actor = ray.get_actor(shard_name(name, shard), namespace=NAMESPACE)
    pid: int = ray.get(actor.ping.remote())
    return pid


def kill_shard(shard: int) -> None:
    """The process dies as it does when the machine is out of memory."""
    os.kill(shard_pid(shard), signal.SIGKILL)


def memory_actors() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("ray") / "store", ENTRIES).path


@pytest.fixture(scope="module")
def memory(store_path: Path) -> Iterator[RayMemory]:
    with (
        local_ray(),
        RayMemory.start(
            store_path,
            shards=2,
            encoder=toy_factory,
            weights=toy_weights(1),
            name=NAME,
            cpus_per_shard=0.25,
        ) as memory,
    ):
        yield memory


def test_a_killed_shard_answers_right_again_from_every_held_epoch(memory: RayMemory) -> None:
    first = memory.info().epoch
    second = memory.stage(encoder_step=5, weights=toy_weights(2))
    memory.wait_sealed(second, 60)
    memory.activate(second)
    queries = toy_queries(4)
    for shard in (0, 1):
        dead = shard_pid(shard)
        os.kill(dead, signal.SIGKILL)
        for epoch, seed in ((None, 2), (first, 1)):
            reply = memory.search(queries, 7, epoch=epoch)
            assert reply.ids.tolist() == expected_ids(ENTRIES, toy_weights(seed), queries, 7)
            assert reply.missing_shards == ()
        assert shard_pid(shard) != dead
    # What restarted takes part in the next refresh, with or without new weights.
    third = memory.stage(encoder_step=6)
    memory.wait_sealed(third, 60)
    memory.activate(third)
    reply = memory.search(queries, 7)
    assert (reply.epoch, reply.encoder_step) == (third, 6)
    assert reply.ids.tolist() == expected_ids(ENTRIES, toy_weights(2), queries, 7)
    memory.release(first)
    memory.release(second)
    assert [entry.id for entry in memory.entries([80, 3])] == [80, 3]


def test_while_a_shard_is_lost(memory: RayMemory) -> None:
    queries = toy_queries(3)
    whole = memory.search(queries, 90)
    hasty = RayMemory.attach(NAME, deadline_s=0.3)
    degrading = RayMemory.attach(NAME, on_lost_shard="degrade", deadline_s=20.0)
    assert degrading.search(queries, 90).missing_shards == ()
    assert hasty.search(queries, 1).missing_shards == ()
    kill_shard(1)
    with pytest.raises(ShardLost, match=r"shard 1.*deadline_s"):
        hasty.search(queries, 5)
    part = degrading.search(queries, 90)
    assert part.missing_shards == (1,)
    held = [row[row >= 0].tolist() for row in part.ids]
    assert [len(row) for row in held] == [45] * 3
    for row, every in zip(held, whole.ids.tolist(), strict=True):
        assert row == [entry_id for entry_id in every if entry_id in set(row)]
    assert torch.equal(memory.search(queries, 90).ids, whole.ids)


def test_a_shard_killed_in_the_middle_of_staging(memory: RayMemory) -> None:
    slow = {**toy_weights(3), "slow": torch.tensor(1.0)}
    epoch = memory.stage(encoder_step=9, weights=slow)
    kill_shard(0)
    memory.wait_sealed(epoch, 60)
    memory.activate(epoch)
    queries = toy_queries(3)
    reply = memory.search(queries, 5)
    assert reply.epoch == epoch
    assert reply.ids.tolist() == expected_ids(ENTRIES, toy_weights(3), queries, 5)


@ray.remote(num_cpus=0.25)
class Trainer:
    """Searches through a pickled memory, as a trainer's process does."""

    def __init__(self, memory: RayMemory) -> None:
        self._memory = memory

    def search_for(self, seconds: float) -> list[Retrieved]:
        end, replies = time.monotonic() + seconds, []
        while time.monotonic() < end:
            replies.append(self._memory.search(toy_queries(2), 4))
        self._memory.close()  # an attached client only lets go
        return replies


def test_other_processes_search_while_epochs_change(memory: RayMemory) -> None:
    trainer = Trainer.remote(memory)
    searching = trainer.search_for.remote(4.0)
    seeds = {memory.info().encoder_step: 3}
    for step in range(100, 112):
        old = memory.info().epoch
        seeds[step] = step
        epoch = memory.stage(encoder_step=step, weights=toy_weights(step))
        memory.wait_sealed(epoch, 60)
        memory.activate(epoch)
        assert memory.search(toy_queries(1), 1).encoder_step == step
        memory.release(old)
    replies = ray.get(searching, timeout=60)
    assert len(replies) > 20
    for reply in replies:
        weights = toy_weights(seeds[reply.encoder_step])
        assert reply.ids.tolist() == expected_ids(ENTRIES, weights, toy_queries(2), 4)
    assert memory.search(toy_queries(1), 1).missing_shards == ()
    ray.kill(trainer)


def test_large_requests_travel_too(memory: RayMemory) -> None:
    queries = toy_queries(4000)
    assert queries.nbytes > 100_000
    found = memory.search(queries, 3)
    assert torch.equal(found.ids[-5:], memory.search(queries[-5:], 3).ids)


def test_starts_that_are_refused_leave_no_actor(memory: RayMemory, store_path: Path) -> None:
    before = memory_actors()
    assert before == [NAME, shard_name(NAME, 0), shard_name(NAME, 1)]
    settings = {"encoder": toy_factory, "weights": toy_weights(1), "shards": 2}
    with pytest.raises(MemoryServerError, match="already"):
        RayMemory.start(store_path, name=NAME, cpus_per_shard=0.25, **settings)
    with pytest.raises(ValueError, match="cpus_per_shard"):
        RayMemory.start(store_path, name="big", cpus_per_shard=64.0, **settings)
    with pytest.raises(ValueError, match="shards=0"):
        RayMemory.start(store_path, name="none", **{**settings, "shards": 0})
    with pytest.raises(RefreshFailed, match="this encoder cannot be built"):
        RayMemory.start(
            store_path, name="bad", cpus_per_shard=0.25, **{**settings, "encoder": bad_factory}
        )
    with pytest.raises(CoordinatorLost, match="nobody"):
        RayMemory.attach("nobody")
    assert memory_actors() == before


def bad_factory(weights: Mapping[str, Tensor]) -> KeyEncoder:
    raise ValueError("this encoder cannot be built")


def test_close_ends_every_process_that_was_started(memory: RayMemory) -> None:
    pids = [shard_pid(shard) for shard in (0, 1)]
    attached = RayMemory.attach(NAME, deadline_s=30.0)
    memory.close()
    assert memory_actors() == []
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    began = time.monotonic()
    with pytest.raises((ShardLost, CoordinatorLost)):
        attached.search(torch.zeros(1, KEY_WIDTH), 1)
    assert time.monotonic() - began < 20  # told at once, not at the deadline


def test_without_ray_the_error_says_so(store_path: Path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(MemoryServerError, match=r"ray\.init"):
        RayMemory.start(store_path, shards=1, encoder=toy_factory, weights=toy_weights(1), name="x")
