"""A shard in an actor of its own. After a restart it asks the coordinator what to hold."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from memory_server.api import Entry, KeyEncoderFactory
from memory_server.epochs import EpochPlan
from memory_server.errors import CoordinatorLost, MemoryServerError
from memory_server.held_epoch import ShardStatus
from memory_server.ray_names import NAMESPACE, unpack_weights
from memory_server.replies import ShardReply
from memory_server.shard import LoadWeights, Shard

JOIN_TIMEOUT_S = 60.0


class ShardHost:
    """The body of a shard's actor: searches in one group of threads, control in another."""

    def __init__(
        self,
        store_path: str,
        *,
        shards: int,
        shard: int,
        encoder: KeyEncoderFactory,
        index: str,
        device: str,
        threads: int,
        coordinator: str,
    ) -> None:
        """Load the shard and begin to build every epoch that the coordinator knows.

        An actor whose constructor raises is never restarted, so a failure here is kept and told to
        whoever calls.

        Args:
            coordinator: the coordinator's name. Not its handle: Ray keeps that in the object store,
                and an actor whose constructor needs the store may fail to restart.
        """
        torch.set_num_threads(threads)
        self._broken: MemoryServerError | None = None
        try:
            self._shard = Shard(
                store_path, shards=shards, shard=shard, encoder=encoder, device=device, index=index
            )
            self._join(coordinator)
        except MemoryServerError as error:
            self._broken = error

    def _join(self, coordinator: str) -> None:
        try:
            actor: Any = ray.get_actor(coordinator, namespace=NAMESPACE)
            held, live = ray.get(actor.join.remote(), timeout=JOIN_TIMEOUT_S)
        except (ValueError, RayError) as error:
            raise CoordinatorLost(
                "a shard restarted, but the memory's coordinator does not answer: "
                "close this memory and start it again"
            ) from error
        for plan, weights, sealed in held:  # the live epoch comes first
            self._shard.stage(plan, _loader(weights), restoring=sealed)
        if live is not None:
            self._shard.activate(live)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    @ray.method(concurrency_group="search")
    def search(
        self,
        queries_BQ: Any,
        k: int,
        exclude_doc_ids: Any,
        epoch: int | None,
        wait_s: float,
    ) -> ShardReply:
        """`Shard.search` with numpy arrays."""
        self._check()
        excluded = None if exclude_doc_ids is None else torch.tensor(exclude_doc_ids)
        return self._shard.search(torch.tensor(queries_BQ), k, excluded, epoch=epoch, wait_s=wait_s)

    @ray.method(concurrency_group="search")
    def entries(self, ids: Sequence[int], epoch: int | None, wait_s: float) -> list[Entry]:
        """`Shard.entries`."""
        self._check()
        return self._shard.entries(ids, epoch=epoch, wait_s=wait_s)

    @ray.method(concurrency_group="control")
    def ping(self) -> int:
        """The process id, once the shard is up. Raises what keeps it from working."""
        self._check()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def stage(self, plan: EpochPlan, weights: list[Any], held: Sequence[int]) -> None:
        """`Shard.stage`, after dropping epochs that the coordinator no longer knows.

        Args:
            weights: one object reference, in a list so that Ray does not fetch it before it is
                needed.
        """
        self._check()
        for epoch in self._shard.held_epochs():
            if epoch not in held:
                self._shard.release(epoch)
        self._shard.stage(plan, _loader(weights))

    @ray.method(concurrency_group="control")
    def status(self, epoch: int) -> ShardStatus:
        """`Shard.status`."""
        self._check()
        return self._shard.status(epoch)

    @ray.method(concurrency_group="control")
    def activate(self, epoch: int) -> None:
        """`Shard.activate`."""
        self._check()
        self._shard.activate(epoch)

    @ray.method(concurrency_group="control")
    def release(self, epoch: int) -> None:
        """`Shard.release`."""
        self._check()
        self._shard.release(epoch)


def _loader(weights: list[Any]) -> LoadWeights:
    def load() -> Mapping[str, Tensor]:
        return unpack_weights(ray.get(weights[0]))

    return load
