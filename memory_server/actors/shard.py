"""A shard in an actor of its own. It follows the coordinator's orders, and serves searches on a
socket of its own, beside Ray."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from memory_server.actors.calls import find_actor
from memory_server.actors.coming_up import ComingUp
from memory_server.actors.follower import Follower
from memory_server.actors.metrics import MetricsPublisher
from memory_server.actors.names import Layout, unpack_weights
from memory_server.actors.orders import Need, Orders
from memory_server.actors.restored import RestoredShard
from memory_server.actors.state import StateDirectory
from memory_server.api import Entry, KeyEncoderFactory
from memory_server.errors import (
    StateNotFound,
    UnknownEpoch,
)
from memory_server.replies import ShardReply
from memory_server.shard.epochs import EpochPlan
from memory_server.shard.held_epoch import ShardStatus
from memory_server.shard.shard import Shard
from memory_server.stats import ShardStats, latency
from memory_server.wire.search_messages import SearchRequest
from memory_server.wire.search_server import SearchServer

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
JOIN_PAUSE_S = 0.1
RESTORE_PAUSE_S = 1.0
WEIGHTS_TIMEOUT_S = 300.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """How every shard of a memory is run.

    Attributes:
        memory_limit_bytes: of one shard's keys; None: what its node or GPU has free.
    """

    encoder: KeyEncoderFactory
    secret: bytes = field(repr=False)
    device: str = "cpu"
    threads: int = 1
    memory_limit_bytes: int | None = None
    queue_limit: int = 256
    host: str | None = None


class ShardHost:
    """The body of a shard's actor."""

    def __init__(self, layout: Layout, settings: HostSettings, *, shard: int, replica: int) -> None:
        """Serve at once, and read in the background what to hold.

        An actor whose constructor raises is never restarted, so a failure here is told to whoever
        calls, and it is tried again. Nothing here may be a handle or an object reference: Ray keeps
        those in the object store, and an actor whose constructor needs the store may fail to
        restart.
        """
        torch.set_num_threads(settings.threads)
        self._layout, self._settings = layout, settings
        self._address = shard, replica
        self._began = time.monotonic()
        self._state = StateDirectory(layout.state_dir)
        self._node = ray.get_runtime_context().get_node_id()
        self._ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._closed = threading.Event()
        self._up = ComingUp(self._begin, f"replica {replica} of shard {shard} of {layout.name!r}")

    def _begin(self) -> None:
        layout, settings = self._layout, self._settings
        shard, replica = self._address
        with contextlib.ExitStack() as undone:
            self._shard = Shard(
                layout.store_path,
                shards=layout.shards,
                shard=shard,
                encoder=settings.encoder,
                device=settings.device,
                index=layout.index,
                scratch=_scratch(),
                memory_limit_bytes=settings.memory_limit_bytes,
            )
            undone.callback(self._shard.close)
            self._restored = RestoredShard(self._shard)
            self._follower = Follower(self._shard, self._restored, self._load)
            self._server = SearchServer(
                self._restored,
                secret=settings.secret,
                host=settings.host or self._ip,
                queue_limit=settings.queue_limit,
            )
            undone.pop_all()
        threading.Thread(target=self._join, name=f"join-shard-{shard}", daemon=True).start()
        self._metrics = MetricsPublisher(
            self._report, memory=layout.name, shard=shard, replica=replica
        )

    @ray.method(concurrency_group="search")
    def search(self, arguments: Mapping[str, Any]) -> ShardReply:
        """As `SearchServer.ask`, for whoever cannot reach the socket."""
        self._check()
        excluded = arguments["exclude_doc_ids"]
        request = SearchRequest(
            queries=arguments["queries_BQ"].copy(),  # Ray's own are read-only
            k=arguments["k"],
            exclude_doc_ids=None if excluded is None else excluded.copy(),
            exact=arguments["exact"],
            domains=arguments["domains"],
        )
        return self._server.ask(
            request,
            epoch=arguments["epoch"],
            wait_s=arguments["wait_s"],
            timeout_s=arguments["timeout_s"],
        )

    @ray.method(concurrency_group="search")
    def entries(self, arguments: Mapping[str, Any]) -> list[Entry]:
        """`Shard.entries`."""
        self._check()
        return self._restored.entries(
            arguments["ids"],
            epoch=arguments["epoch"],
            wait_s=arguments["wait_s"],
            domains=arguments["domains"],
        )

    @ray.method(concurrency_group="control")
    def ping(self) -> int:
        """The process id, once the shard is up. Raises what keeps it from working."""
        self._check()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def endpoint(self) -> tuple[str, str]:
        """(where the socket is, the address of this node)"""
        self._check()
        return self._server.endpoint, self._ip

    @ray.method(concurrency_group="control")
    def follow(self, orders: Orders) -> int:
        """Stage, drop and switch as the orders say; older ones than were followed are ignored.

        Returns:
            The revision that is followed now. Staging goes on in the background.
        """
        self._check()
        return self._follower.follow(orders)

    @ray.method(concurrency_group="control")
    def status(self, epoch: int) -> ShardStatus:
        """`Shard.status`."""
        self._check()
        return self._shard.status(epoch)

    @ray.method(concurrency_group="refresh")
    def need(self, plan: EpochPlan, pending: Sequence[int]) -> Need:
        """What staging the plan would take here, beside the pending epochs.

        Raises:
            UnknownVersion, StoreDamaged.
        """
        self._check()
        cost = self._shard.stage_cost(plan)
        if self._settings.memory_limit_bytes is not None:
            place = f"shard {self._address[0]} (memory_limit_bytes)"
        elif self._settings.device == "cuda":
            place = f"GPU {torch.cuda.get_device_properties(0).uuid} of node {self._node}"
        else:
            place = f"node {self._node}"
        on_gpu = self._settings.device == "cuda"  # where each process has tables of its own
        return Need(
            place=place,
            bytes=cost.own + (cost.tables if on_gpu else 0),
            tables=0 if on_gpu else cost.tables,
            free=cost.free,
            pending=self._pending_bytes(pending),
        )

    @ray.method(concurrency_group="control")
    def report(self) -> ShardStats:
        """What this replica counts, for stats."""
        self._check()
        return self._report()

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Give back what would outlive this process: shared tables, the socket."""
        self._closed.set()
        self._up.end()
        if self._up.is_up:
            self._metrics.close()
            self._server.close()
            self._shard.close()

    def _join(self) -> None:
        """Ask the coordinator what to hold, until it answers: it may be restarting, too. Then keep
        trying to restore what could not be restored."""
        joined, pause_s = False, 0.0
        while not self._closed.wait(pause_s):
            pause_s = RESTORE_PAUSE_S if joined else JOIN_PAUSE_S
            try:
                if not joined:
                    coordinator = find_actor(self._layout.name)
                    joining = coordinator.join.remote(*self._address)
                    self._follower.follow(ray.get(joining, timeout=JOIN_TIMEOUT_S))
                    joined = True
                self._follower.restore_again(time.monotonic())
            except Exception as error:  # whatever happens, it goes on
                log.info("shard %s cannot follow yet: %s", self._address, error)

    def _load(self, weights_id: int) -> Mapping[str, Tensor]:
        """From the state directory if this node sees it, or else through the coordinator."""
        with contextlib.suppress(StateNotFound):
            return self._state.load_weights(weights_id)
        coordinator = find_actor(self._layout.name)
        packed = ray.get(coordinator.weights.remote(weights_id), timeout=WEIGHTS_TIMEOUT_S)
        return unpack_weights(packed)

    def _pending_bytes(self, epochs: Sequence[int]) -> int:
        """What epochs that are being staged here have yet to take."""
        added = 0
        orders = self._follower.orders
        for order in () if orders is None else orders.epochs:
            if order.plan.epoch not in epochs:
                continue
            with contextlib.suppress(UnknownEpoch):
                status = self._shard.status(order.plan.epoch)
                if status.state == "encoding":
                    left = 1.0 if not status.total else 1 - status.done / status.total
                    added += int(self._shard.stage_cost(order.plan).own * left)
        return added

    def _report(self) -> ShardStats:
        served, audit = self._server.stats(), self._shard.audit.report
        orders = self._follower.orders
        live = None if orders is None else orders.live
        stats = ShardStats(
            shard=self._address[0],
            replica=self._address[1],
            newest_step=self._shard.newest_step(),
            state="serving" if self._restored.is_joined else "restoring",
            node=self._node,
            pid=os.getpid(),
            device=self._settings.device,
            requests=served.requests,
            queries=served.queries,
            overloaded=served.overloaded,
            failed=served.failed,
            queue=served.queue,
            queue_peak=served.queue_peak,
            queue_limit=served.queue_limit,
            latency=latency(served.latency_counts, served.latency_sum_s),
            latency_counts=served.latency_counts,
            recall=asdict(audit),
            uptime_s=time.monotonic() - self._began,
        )
        if live is None:
            return stats
        try:
            status = self._shard.status(live)
        except UnknownEpoch:
            return stats
        if status.receipt is None:
            return replace(stats, epoch=live, state="restoring", error=status.error)
        return replace(
            stats,
            epoch=live,
            encoder_step=status.receipt.encoder_step,
            bytes=dict(status.receipt.bytes),
        )

    def _check(self) -> None:
        self._up.check()


def _scratch() -> Path | None:
    """Where this user's shards on a node share tables, in memory; of all memories, so that each
    clears away what a dead one left."""
    return SHARED_MEMORY / f"pluglm-{os.getuid()}" if SHARED_MEMORY.is_dir() else None
