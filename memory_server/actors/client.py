"""The memory served by actors: start it, attach to it from any process, search all shards at once.

A client holds no state that matters. It pickles as the memory's name, so trainers in other
processes get their own. Searches go to the shards directly; only what changes epochs, and what
asks about them, goes to the coordinator.
"""

import secrets
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from memory_server.actors.launch import ServerSettings, StartedActors, start_actors
from memory_server.actors.leader import Leader, RayPin
from memory_server.actors.names import Layout, pack_weights
from memory_server.actors.places import Placement
from memory_server.actors.reach import fanout_to
from memory_server.actors.servers import ServerInfo, list_servers, planned, shut_down
from memory_server.api import (
    Entry,
    KeyEncoderFactory,
    LostShardPolicy,
    MemoryInfo,
    Retrieved,
    StageStatus,
)
from memory_server.errors import MemoryClosed
from memory_server.index.base import IndexSettings
from memory_server.requests import checked_request
from memory_server.stats import MemoryStats
from memory_server.store.store import Store
from memory_server.waiting import wait_until_sealed
from memory_server.wire.fan_out import SearchFanout, default_fan_in

# What changes epochs waits for shards at least this long, however short a search's deadline is:
# giving up on a search costs one answer, giving up on a switch ends a training.
CONTROL_AT_LEAST_S = 60.0
REBASE_TIMEOUT_S = 24 * 3600.0


class RayMemory:
    """A `Memory` of Ray actors. Make one with `start`, `serve` or `attach`."""

    def __init__(
        self,
        leader: Leader,
        *,
        on_lost_shard: LostShardPolicy,
        deadline_s: float,
        domains: Collection[str] = (),
        started: StartedActors | None = None,
    ) -> None:
        """See `start` and `attach`, which make one."""
        if on_lost_shard not in ("wait", "degrade"):
            raise ValueError(f"on_lost_shard={on_lost_shard!r}; allowed: 'wait', 'degrade'")
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be greater than 0")
        self._leader = leader
        attachment = leader.attachment
        self._layout = attachment.layout
        self._secret = attachment.secret
        self._key_width = attachment.key_width
        self._policy: LostShardPolicy = on_lost_shard
        self._deadline_s = deadline_s
        self._domains = tuple(domains)
        self._started = started
        self._opening = threading.Lock()
        self._fanout: SearchFanout | None = None
        self._closed = False

    @classmethod
    def start(
        cls,
        store_path: Path | str,
        *,
        shards: int,
        encoder: KeyEncoderFactory,
        weights: Mapping[str, Tensor] | None,
        name: str,
        encoder_step: int = 0,
        content_version: str | None = None,
        domains: Collection[str] = (),
        index: IndexSettings | str = "flat",
        replicas: int = 1,
        placement: Placement = "spread",
        on_lost_shard: LostShardPolicy = "wait",
        deadline_s: float = 60.0,
        cpus_per_shard: float = 1.0,
        threads_per_shard: int = 1,
        gpus_per_shard: float = 0.0,
        resources_per_shard: Mapping[str, float] | None = None,
        hedge_after_s: float | Literal["p95"] = "p95",
        fan_in: int | None = None,
        queue_limit: int = 256,
        host: str | None = None,
        queries: Literal["float16", "float32"] = "float16",
        state_dir: Path | str | None = None,
        memory_limit_bytes: int | None = None,
        detached: bool = False,
        start_timeout_s: float = 300.0,
        first_epoch_timeout_s: float = 24 * 3600.0,
        server: ServerSettings | None = None,
    ) -> Self:
        """Start the actors and encode every entry; blocks until the first epoch is live.

        Ray must be running. Start it with `_system_config={"worker_niceness": 0}`: at Ray's own
        niceness a busy machine starves the shards.

        Args:
            store_path: readable under this path by every node that gets an actor.
            weights: what makes the keys; None: go on with the weights, their step and, unless
                given, the content that were live when the memory of `state_dir` ended.
            name: by which other processes attach; unique in the cluster.
            domains: this client reads only their entries; the actors hold all, for other clients.
                None named: all that are plugged. See `attach`.
            index: how keys are held and searched; a string is an `IndexSettings.kind`.
            replicas: actors that hold the same shard, on different nodes if there are several.
            placement: "spread" the actors over the nodes, or "pack" them on few.
            cpus_per_shard: what each actor reserves in Ray; may be a fraction, or 0.
            threads_per_shard: torch threads of each actor.
            gpus_per_shard: above 0, keys and search are on the GPU.
            resources_per_shard: what else each actor reserves, by name.
            deadline_s: how long a search waits for a shard. Switching to an epoch and releasing
                one wait as long, but at least `CONTROL_AT_LEAST_S`.
            hedge_after_s: seconds until a search asks a second replica; "p95": as measured.
            fan_in: with more shards than this, a shard asks a group of so many for the client;
                None: `default_fan_in`, 16 with one replica and 256 with more.
            queue_limit: searches that may wait at a shard before others are told `Overloaded`.
            host: address of each node that its shards listen at; None: the one that Ray uses
                between nodes. With "127.0.0.1" clients on other nodes go through Ray's own calls.
            queries: how they travel; halves are enough to find, the shard scores with what it gets.
            state_dir: where the epochs' book and the weights are kept, on a filesystem that the
                coordinator's node sees; by default STORE/servers/NAME.
            memory_limit_bytes: all held epochs of this memory take no more on one node, shared out
                evenly over its actors there; by default what is free on the node, or the GPU.
            detached: the actors outlive this driver, and `close` only lets go; see `serve`.
            start_timeout_s: how long the actors may take to come up.
            server: instead of the arguments that it holds, for tests of failures.

        Raises:
            ValueError, StoreNotFound, StoreDamaged, UnknownVersion, UnknownDomain, StateNotFound,
            MemoryServerError: refused. RefreshFailed: the first epoch failed. ShardLost: the
                actors did not come up. No actor stays.
        """
        settings = server or ServerSettings(
            shards=shards,
            replicas=replicas,
            placement=placement,
            cpus_per_shard=cpus_per_shard,
            threads_per_shard=threads_per_shard,
            gpus_per_shard=gpus_per_shard,
            resources_per_shard=dict(resources_per_shard or {}),
            queue_limit=queue_limit,
            host=host,
            memory_limit_bytes=memory_limit_bytes,
            detached=detached,
        )
        layout, first = planned(
            store_path,
            settings,
            name=name,
            encoder=encoder,
            index=IndexSettings(kind=index) if isinstance(index, str) else index,
            state_dir=state_dir,
            weights=weights,
            encoder_step=encoder_step,
            content_version=content_version,
        )
        if domains:
            Store.open(layout.store_path).manifest(first.content_version).of_domains(domains)
        asked_directly = default_fan_in(settings.replicas) if fan_in is None else fan_in
        layout = replace(
            layout, hedge_after_s=hedge_after_s, fan_in=asked_directly, queries=queries
        )
        started = start_actors(layout, settings, encoder, first.book, timeout_s=start_timeout_s)
        try:
            leader = Leader.find(name, timeout_s=start_timeout_s)
            memory = cls(
                leader,
                on_lost_shard=on_lost_shard,
                deadline_s=deadline_s,
                domains=domains,
                started=started,
            )
            memory._shards()  # refuses bad settings of searches before any work
            epoch = memory.stage(
                encoder_step=first.encoder_step,
                weights=first.weights,
                content_version=first.content_version,
            )
            memory.wait_sealed(epoch, first_epoch_timeout_s)
            memory.activate(epoch)
            memory.info()
        except BaseException:
            started.kill()
            raise
        return memory

    @classmethod
    def serve(cls, store_path: Path | str, **settings: Any) -> Self:
        """`start` a memory whose actors outlive this driver; end it with `shut_down`.

        Its Ray must outlive the driver, too: `ray start --head`, then `ray.init(address="auto")`.
        """
        return cls.start(store_path, **{**settings, "detached": True})

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        on_lost_shard: LostShardPolicy = "wait",
        deadline_s: float = 60.0,
        domains: Collection[str] = (),
    ) -> Self:
        """Find a memory that another process started.

        Args:
            domains: this client reads only their entries, as if nothing else was in the memory:
                it answers bit for bit as `LocalMemory(domains=...)`, always exactly. If another
                client makes content live that has not all of them, it raises UnknownDomain.

        Raises:
            CoordinatorLost: there is none of this name in the cluster, or it does not answer.
            UnknownDomain: the live content has not all of `domains`.
        """
        leader = Leader.find(name, timeout_s=max(deadline_s, CONTROL_AT_LEAST_S))
        memory = cls(leader, on_lost_shard=on_lost_shard, deadline_s=deadline_s, domains=domains)
        if domains:
            memory.info()
        return memory

    @staticmethod
    def list_servers() -> list[ServerInfo]:
        """The memories that run in this Ray cluster, by name."""
        return list_servers()

    @staticmethod
    def shut_down(name: str, *, forget: bool = False) -> None:
        """End every actor of a memory, whoever started it; returns when they are gone.

        Args:
            forget: remove its state, too; otherwise `serve` with `weights=None` goes on from it.

        Raises:
            CoordinatorLost: there is none of this name.
        """
        shut_down(name, forget=forget)

    def __reduce__(
        self,
    ) -> tuple[Callable[..., "RayMemory"], tuple[str, LostShardPolicy, float, tuple[str, ...]]]:
        return _attach, (self._layout.name, self._policy, self._deadline_s, self._domains)

    @property
    def name(self) -> str:
        """The name to attach by."""
        return self._layout.name

    @property
    def layout(self) -> Layout:
        """How it is laid out, and of which store."""
        return self._layout

    def info(self) -> MemoryInfo:
        """See `Memory.info`. Of domains, `entries` is theirs and `bytes` those of the whole memory.

        Raises:
            UnknownDomain: the live content has not all of this client's.
        """
        info: MemoryInfo = self._control("info", *([self._domains] if self._domains else []))
        self._key_width = info.key_width
        return info

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        *,
        exclude_doc_ids: Tensor | None = None,
        epoch: int | None = None,
        exact: bool = False,
    ) -> Retrieved:
        """See `Memory.search`. Asks all shards at once; not collective."""
        self._check_open()
        width = self._key_width if self._key_width is not None else self.info().key_width
        queries, excluded = checked_request(queries_BQ, k, exclude_doc_ids, width)
        return self._shards().search(
            queries, k, excluded, epoch=epoch, exact=exact, domains=self._domains
        )

    def stage(
        self,
        *,
        encoder_step: int,
        weights: Mapping[str, Tensor] | None = None,
        content_version: str | None = None,
    ) -> int:
        """See `Memory.stage`. Returns when the weights are on the coordinator's disk.

        Raises:
            UnknownDomain: the content has not all of this client's.
        """
        if self._domains and content_version is not None:
            self._control("check_domains", content_version, self._domains)
        packed = None if weights is None else pack_weights(weights)
        request = secrets.token_hex(8)
        epoch: int = self._control("stage", request, encoder_step, packed, content_version)
        return epoch

    def staging(self, epoch: int) -> StageStatus:
        """See `Memory.staging`."""
        status: StageStatus = self._control("staging", epoch)
        return status

    def held(self) -> list[StageStatus]:
        """Every epoch that is held or coming."""
        statuses: list[StageStatus] = self._control("held")
        return statuses

    def wait_sealed(self, epoch: int, timeout_s: float) -> None:
        """See `Memory.wait_sealed`."""
        wait_until_sealed(self.staging, epoch, timeout_s)

    def activate(self, epoch: int, *, expected_live: int | None = None) -> int:
        """See `Memory.activate`."""
        # One token for all calls: what is repeated after a lost answer must not switch again.
        order = (epoch, expected_live, self._control_s, secrets.token_hex(8))
        live, number = self._control("activate", *order)
        while not live:
            try:
                self.wait_sealed(number, REBASE_TIMEOUT_S)
            except BaseException:
                self.release(number)
                raise
            live, number = self._control("activate", *order)
        return int(number)

    def pin(self, epoch: int | None = None, *, lease_s: float = 60.0) -> RayPin:
        """See `Memory.pin`."""
        pin, pinned = self._control("pin", secrets.token_hex(8), epoch, lease_s)
        return RayPin(self._leader, pin, pinned)

    def release(self, epoch: int) -> None:
        """See `Memory.release`."""
        self._control("release", epoch, self._control_s)

    def cancel(self, epoch: int) -> None:
        """Stop staging an epoch: the same as `release`."""
        self.release(epoch)

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """See `Memory.entries`. A lost shard is always waited for."""
        self._check_open()
        wanted = [int(entry_id) for entry_id in ids]
        return self._shards().entries(wanted, domains=self._domains)

    def stats(self) -> MemoryStats:
        """What the memory and this process have counted; blocks for a second or two at most."""
        stats: MemoryStats = self._control("stats")
        return replace(stats, client=self._shards().stats().as_dict())

    def close(self) -> None:
        """End every actor, if this client started them and they are not detached; otherwise only
        let go."""
        if self._closed:
            return
        self._closed = True
        if self._fanout is not None:
            self._fanout.close()
        if self._started is not None and not self._layout.detached:
            self._started.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _control_s(self) -> float:
        return max(self._deadline_s, CONTROL_AT_LEAST_S)

    def _control(self, method: str, *arguments: Any) -> Any:
        self._check_open()
        return self._leader.call(method, *arguments, timeout_s=self._control_s)

    def _shards(self) -> SearchFanout:
        with self._opening:
            if self._fanout is None:
                self._fanout = fanout_to(
                    self._layout, self._secret, policy=self._policy, deadline_s=self._deadline_s
                )
                # Sockets that are collected while they are open would hang the process.
                weakref.finalize(self, self._fanout.close)
            return self._fanout

    def _check_open(self) -> None:
        if self._closed:
            raise MemoryClosed("this memory was closed; start or attach to another one")


def _attach(
    name: str, policy: LostShardPolicy, deadline_s: float, domains: tuple[str, ...]
) -> RayMemory:
    return RayMemory.attach(name, on_lost_shard=policy, deadline_s=deadline_s, domains=domains)
