"""The memory served by actors: start it, attach to it from any process, search all shards at once.

A client holds no state that matters. It pickles as the memory's name, so trainers in other
processes get their own; only the client that started the memory ends its actors.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch import Tensor

from memory_server.api import (
    Entry,
    KeyEncoderFactory,
    LostShardPolicy,
    MemoryInfo,
    Retrieved,
    StageStatus,
)
from memory_server.errors import CoordinatorLost, MemoryClosed
from memory_server.ray_coordinator import Layout
from memory_server.ray_fanout import ask_shards, original_error
from memory_server.ray_launch import StartedActors, start_actors
from memory_server.ray_names import NAMESPACE, pack_weights, shard_name
from memory_server.replies import ShardReply, merge_replies
from memory_server.requests import checked_request
from memory_server.waiting import in_order, wait_until_sealed

# What changes epochs waits for shards at least this long, however short a search's deadline is:
# giving up on a search costs one answer, giving up on a switch ends a training.
CONTROL_AT_LEAST_S = 60.0
CONTROL_MARGIN_S = 30.0  # for the coordinator itself, beyond what it waits for its shards
INLINE_BYTES = 64 << 10  # a larger argument goes through the object store once, not once a shard


class RayMemory:
    """A `Memory` of Ray actors. Make one with `RayMemory.start` or `RayMemory.attach`."""

    def __init__(
        self,
        *,
        layout: Layout,
        coordinator: Any,
        shards: Sequence[Any],
        on_lost_shard: LostShardPolicy,
        deadline_s: float,
        started: StartedActors | None,
    ) -> None:
        if on_lost_shard not in ("wait", "degrade"):
            raise ValueError(f"on_lost_shard={on_lost_shard!r}; allowed: 'wait', 'degrade'")
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be greater than 0")
        self._layout = layout
        self._coordinator = coordinator
        self._shards = list(shards)
        self._policy: LostShardPolicy = on_lost_shard
        self._deadline_s = deadline_s
        self._started = started
        self._key_width: int | None = None
        self._closed = False

    @classmethod
    def start(
        cls,
        store_path: Path | str,
        *,
        shards: int,
        encoder: KeyEncoderFactory,
        weights: Mapping[str, Tensor],
        name: str,
        encoder_step: int = 0,
        content_version: str | None = None,
        index: str = "flat",
        on_lost_shard: LostShardPolicy = "wait",
        deadline_s: float = 60.0,
        cpus_per_shard: float = 1.0,
        threads_per_shard: int = 1,
        gpus_per_shard: float = 0.0,
        start_timeout_s: float = 300.0,
        first_epoch_timeout_s: float = 24 * 3600.0,
    ) -> Self:
        """Start the actors and encode every entry; blocks until the first epoch is live.

        Ray must be running. Start it with `_system_config={"worker_niceness": 0}`: at Ray's own
        niceness a busy machine starves the shards.

        Args:
            store_path: readable under this path by every node that gets an actor.
            name: by which other processes attach; unique in the cluster.
            cpus_per_shard: what each shard reserves in Ray; may be a fraction, or 0.
            threads_per_shard: torch threads of each shard.
            deadline_s: how long a search waits for a shard. Switching to an epoch and releasing
                one wait as long, but at least `CONTROL_AT_LEAST_S`.
            gpus_per_shard: above 0, keys and search are on the GPU.
            start_timeout_s: how long the actors may take to come up.

        Raises:
            ValueError, StoreNotFound, StoreDamaged, UnknownVersion, MemoryServerError: refused.
            RefreshFailed: the first epoch failed. ShardLost: the actors did not come up. No actor
                stays.
        """
        started = start_actors(
            Path(store_path),
            name=name,
            shards=shards,
            encoder=encoder,
            index=index,
            cpus=cpus_per_shard,
            gpus=gpus_per_shard,
            threads=threads_per_shard,
            timeout_s=start_timeout_s,
            content_version=content_version,
        )
        try:
            memory = cls(
                layout=started.layout,
                coordinator=started.coordinator,
                shards=started.shards,
                on_lost_shard=on_lost_shard,
                deadline_s=deadline_s,
                started=started,
            )
            first = memory.stage(
                encoder_step=encoder_step, weights=weights, content_version=started.version
            )
            memory.wait_sealed(first, first_epoch_timeout_s)
            memory.activate(first)
        except BaseException:
            started.kill()
            raise
        return memory

    @classmethod
    def attach(
        cls, name: str, *, on_lost_shard: LostShardPolicy = "wait", deadline_s: float = 60.0
    ) -> Self:
        """Find a memory that another process started.

        Raises:
            CoordinatorLost: there is none of this name in the cluster.
        """
        try:
            coordinator = ray.get_actor(name, namespace=NAMESPACE)
            layout = _layout_of(coordinator, deadline_s)
            shards = [
                ray.get_actor(shard_name(name, shard), namespace=NAMESPACE)
                for shard in range(layout.shards)
            ]
        except (ValueError, RayError) as error:
            raise CoordinatorLost(
                f"no memory named {name!r} answers in this Ray cluster; check the name, or start "
                "one"
            ) from error
        return cls(
            layout=layout,
            coordinator=coordinator,
            shards=shards,
            on_lost_shard=on_lost_shard,
            deadline_s=deadline_s,
            started=None,
        )

    def __reduce__(self) -> tuple[Callable[..., "RayMemory"], tuple[str, LostShardPolicy, float]]:
        return _attach, (self._layout.name, self._policy, self._deadline_s)

    @property
    def name(self) -> str:
        """The name to attach by."""
        return self._layout.name

    def info(self) -> MemoryInfo:
        """See `Memory.info`."""
        info: MemoryInfo = self._control("info")
        self._key_width = info.key_width
        return info

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        *,
        exclude_doc_ids: Tensor | None = None,
        epoch: int | None = None,
    ) -> Retrieved:
        """See `Memory.search`. Asks all shards at once; not collective."""
        self._check_open()
        width = self._key_width if self._key_width is not None else self.info().key_width
        queries, excluded = checked_request(queries_BQ, k, exclude_doc_ids, width)
        payload: Any = queries.cpu().numpy()
        if payload.nbytes > INLINE_BYTES:
            payload = ray.put(payload)
        documents = None if excluded is None else excluded.cpu().numpy()
        replies, missing = self._ask("search", lambda e: (payload, k, documents, e), epoch)
        while len(epochs := {reply.epoch for reply in replies}) > 1:
            # The live epoch was switched between two shards: all of them hold the newer one.
            replies, missing = self._ask(
                "search", lambda e: (payload, k, documents, e), max(epochs)
            )
        return merge_replies(replies, k, device=queries_BQ.device, missing_shards=missing)

    def stage(
        self,
        *,
        encoder_step: int,
        weights: Mapping[str, Tensor] | None = None,
        content_version: str | None = None,
    ) -> int:
        """See `Memory.stage`. The weights travel once, whatever the number of shards."""
        packed = None if weights is None else pack_weights(weights)
        epoch: int = self._control("stage", encoder_step, packed, content_version)
        return epoch

    def staging(self, epoch: int) -> StageStatus:
        """See `Memory.staging`."""
        status: StageStatus = self._control("staging", epoch)
        return status

    def wait_sealed(self, epoch: int, timeout_s: float) -> None:
        """See `Memory.wait_sealed`."""
        wait_until_sealed(self.staging, epoch, timeout_s)

    def activate(self, epoch: int) -> None:
        """See `Memory.activate`."""
        self._control("activate", epoch, self._control_s)

    def release(self, epoch: int) -> None:
        """See `Memory.release`."""
        self._control("release", epoch, self._control_s)

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """See `Memory.entries`. A lost shard is always waited for."""
        self._check_open()
        wanted = [int(entry_id) for entry_id in ids]
        found, _ = ask_shards(
            self._layout.name,
            self._shards,
            "entries",
            lambda wait_s: (wanted, None, wait_s),
            policy="wait",
            deadline_s=self._deadline_s,
        )
        return in_order(ids, [entry for part in found for entry in part])

    def close(self) -> None:
        """End every actor, if this client started them; an attached client only lets go."""
        if self._started is not None and not self._closed:
            self._started.kill()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(
        self, method: str, arguments: Callable[[int | None], tuple[Any, ...]], epoch: int | None
    ) -> tuple[list[ShardReply], tuple[int, ...]]:
        return ask_shards(
            self._layout.name,
            self._shards,
            method,
            lambda wait_s: (*arguments(epoch), wait_s),
            policy=self._policy,
            deadline_s=self._deadline_s,
        )

    @property
    def _control_s(self) -> float:
        return max(self._deadline_s, CONTROL_AT_LEAST_S)

    def _control(self, method: str, *arguments: Any) -> Any:
        self._check_open()
        try:
            call = getattr(self._coordinator, method).remote(*arguments)
            return ray.get(call, timeout=self._control_s + CONTROL_MARGIN_S)
        except RayTaskError as error:
            raise original_error(error) from None
        except (RayActorError, GetTimeoutError) as error:
            raise CoordinatorLost(
                f"the coordinator of memory {self._layout.name!r} does not answer: searches may "
                "go on, but "
                "epochs cannot change; close this memory and start it again"
            ) from error

    def _check_open(self) -> None:
        if self._closed:
            raise MemoryClosed("this memory was closed; start or attach to another one")


def _layout_of(coordinator: Any, timeout_s: float) -> Layout:
    layout: Layout = ray.get(coordinator.layout.remote(), timeout=timeout_s)
    return layout


def _attach(name: str, policy: LostShardPolicy, deadline_s: float) -> RayMemory:
    return RayMemory.attach(name, on_lost_shard=policy, deadline_s=deadline_s)
