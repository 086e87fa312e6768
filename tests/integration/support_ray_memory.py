"""What the tests of RayMemory share: finding its processes, killing them, checking every reply."""

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import ray
import torch
from torch import Tensor

from memory_server.actors.client import RayMemory
from memory_server.actors.names import NAMESPACE, shard_name
from memory_server.api import Memory, Retrieved
from tests.toy_memory import ToyEntry, expected_ids, toy_queries

WAIT_S = 60.0


def actor(name: str) -> Any:
    return ray.get_actor(name, namespace=NAMESPACE)


def pid_of(name: str) -> int:
    """Of an actor, as soon as it answers: one that was just killed does in a moment."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            pid: int = ray.get(actor(name).ping.remote(), timeout=WAIT_S)
            return pid
        except ray.exceptions.RayActorError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def kill(name: str) -> int:
    """The process dies as it does when the machine is out of memory."""
    pid = pid_of(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def kill_shard(memory: RayMemory, shard: int, replica: int = 0) -> int:
    return kill(shard_name(memory.name, shard, replica))


def memory_actors() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def slow(weights: Mapping[str, Tensor], seconds: float = 1.0) -> dict[str, Tensor]:
    """Weights whose encoder waits so long before each batch."""
    return {**weights, "slow": torch.tensor(seconds)}


def refreshed(memory: Memory, **what: Any) -> int:
    epoch = memory.stage(**what)
    memory.wait_sealed(epoch, WAIT_S)
    return memory.activate(epoch)


class Stream:
    """Searches from a thread until the block ends; every reply must be whole, and of one epoch."""

    def __init__(self, memory: Memory, entries: Sequence[ToyEntry], k: int = 5) -> None:
        self._memory, self._entries, self._k = memory, entries, k
        self._queries = toy_queries(3)
        self._stop = threading.Event()
        self._replies: list[Retrieved] = []
        self._failures: list[Exception] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for(3)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, replies: int) -> None:
        """Until so many more came, or the stream failed."""
        wanted = len(self._replies) + replies
        deadline = time.monotonic() + WAIT_S
        while len(self._replies) < wanted and not self._failures:
            assert time.monotonic() < deadline, "no reply came"
            time.sleep(0.01)

    def check(self, weights_of: Mapping[int, Mapping[str, Tensor]]) -> set[int]:
        """The epochs that answered; `weights_of` are the weights of each."""
        assert self._failures == []
        right = {
            epoch: expected_ids(self._entries, weights, self._queries, self._k)
            for epoch, weights in weights_of.items()
        }
        for reply in self._replies:
            assert reply.missing_shards == ()
            assert reply.ids.tolist() == right[reply.epoch]
        return {reply.epoch for reply in self._replies}

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._replies.append(self._memory.search(self._queries, self._k))
            except Exception as error:
                self._failures.append(error)
                return
