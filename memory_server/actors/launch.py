"""Start a memory's actors, all or none, and end them without leaving one."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memory_server.actors.calls import find_actor, is_gone, original_error
from memory_server.actors.coordinator import Coordinator
from memory_server.actors.names import NAMESPACE, Address, Layout, shard_name
from memory_server.actors.places import (
    PLACEMENTS,
    Placement,
    assign_nodes,
    check_resources,
    living_nodes,
)
from memory_server.actors.server_book import ServerBook
from memory_server.actors.shard import HostSettings, ShardHost
from memory_server.actors.state import StateDirectory
from memory_server.api import KeyEncoderFactory
from memory_server.errors import MemoryServerError, ShardLost
from memory_server.index.factory import check_index

log = logging.getLogger(__name__)

SEARCHES_AT_ONCE = 16  # by way of the actor; they wait in the socket's queue, and are joined
CONTROL_THREADS = 2
REFRESH_THREADS = 1
COORDINATOR_THREADS = 16
CLOSE_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a memory is run; `RayMemory.start` says what each means."""

    shards: int
    replicas: int = 1
    placement: Placement = "spread"
    cpus_per_shard: float = 1.0
    threads_per_shard: int = 1
    gpus_per_shard: float = 0.0
    resources_per_shard: Mapping[str, float] = field(default_factory=dict)
    queue_limit: int = 256
    host: str | None = None
    memory_limit_bytes: int | None = None
    detached: bool = False
    coordinator: type[Coordinator] = Coordinator

    def __post_init__(self) -> None:
        for name in ("shards", "replicas", "threads_per_shard", "queue_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cpus_per_shard", "gpus_per_shard"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement={self.placement!r}; allowed: {', '.join(PLACEMENTS)}")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise ValueError(f"memory_limit_bytes={self.memory_limit_bytes} must be at least 1")

    @property
    def reserved(self) -> dict[str, float]:
        """What one actor reserves in Ray, by resource."""
        own = {"CPU": self.cpus_per_shard, "GPU": self.gpus_per_shard}
        return {kind: n for kind, n in {**own, **self.resources_per_shard}.items() if n}


@dataclass(frozen=True, kw_only=True)
class StartedActors:
    """The actors of one memory, and the content version that its first epoch will hold."""

    layout: Layout
    coordinator: Any
    shards: tuple[Any, ...]

    def kill(self) -> None:
        """End all actors; returns when Ray has forgotten their names. Harmless when Ray is down.

        A memory that is not detached takes its state with it. One that never had a live epoch
        leaves the state that was there before it.
        """
        try:
            if ray.is_initialized():
                end_actors(self.layout.name, self.layout.host_names)
        finally:
            abandon_state(self.layout)


def start_actors(
    layout: Layout,
    settings: ServerSettings,
    encoder: KeyEncoderFactory,
    book: ServerBook,
    *,
    timeout_s: float,
) -> StartedActors:
    """Start the coordinator and the shards, and wait until all are up.

    Args:
        book: that the coordinator begins with. What the state directory held before stays beside
            it until an epoch is live, and comes back if the start fails.

    Raises:
        ValueError, MemoryServerError, ShardLost: refused, or not up in time; no actor stays.
    """
    check_index(layout.index)
    nodes = living_nodes()
    reserved = settings.reserved
    check_resources(nodes, len(layout.addresses), reserved)
    places = assign_nodes(
        nodes,
        shards=layout.shards,
        replicas=layout.replicas,
        each=reserved,
        placement=settings.placement,
    )
    if not is_gone(layout.name):
        raise MemoryServerError(_runs_already(layout.name))
    state = StateDirectory(layout.state_dir)
    actors: list[Any] = []
    with state.locked():  # refused: another memory's state, which is left alone
        secret = state.create(book)
    try:
        actors.append(_start_coordinator(layout, settings))
        for address in layout.addresses:
            actors.append(_start_host(layout, settings, encoder, secret, address, places))
        _wait_until_up(layout.addresses, actors[1:], timeout_s)
    except BaseException:
        try:
            _kill(actors)
            wait_until_gone([layout.name, *layout.host_names])
        finally:
            abandon_state(layout)
        raise
    return StartedActors(layout=layout, coordinator=actors[0], shards=tuple(actors[1:]))


def end_actors(memory: str, hosts: Sequence[str]) -> None:
    """End all actors of a memory; shards that answer first give back what they share with others.

    Args:
        hosts: the names of its shards' actors. One that is not there is left out.
    """
    leader = _found([memory])
    shards = _found(hosts)
    _kill(leader)  # first, so that nobody tells the shards to stage anything any more
    closing = [actor.close.remote() for actor in shards]
    deadline = time.monotonic() + CLOSE_TIMEOUT_S
    for reference in closing:
        try:
            ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except RayError as error:
            log.info("a shard of %s did not close by itself: %s", memory, error)
    _kill(shards)
    wait_until_gone([memory, *hosts])


def abandon_state(layout: Layout) -> None:
    """See `StateDirectory.abandon`. What cannot be done now, the next start does (`before`)."""
    try:
        StateDirectory(layout.state_dir).abandon(keep_live=layout.detached)
    except MemoryServerError as error:
        log.warning("the state of %s stays as it is: %s", layout.name, error)


def wait_until_gone(names: Sequence[str]) -> None:
    """Wait until Ray has forgotten these actors' names."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while names := [name for name in names if not is_gone(name)]:
        if time.monotonic() >= deadline:
            log.warning("actors still there after %g s: %s", KILL_TIMEOUT_S, ", ".join(names))
            return
        time.sleep(POLL_S)


def _found(names: Sequence[str]) -> list[Any]:
    actors = []
    for name in names:
        with contextlib.suppress(ValueError):
            actors.append(find_actor(name))
    return actors


def _lifetime(layout: Layout) -> Literal["detached", "non_detached"]:
    return "detached" if layout.detached else "non_detached"


def _start_coordinator(layout: Layout, settings: ServerSettings) -> Any:
    # By preference where the driver is: there it has just made the state directory.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(settings.coordinator)
    try:
        return actor.options(
            name=layout.name,
            namespace=NAMESPACE,
            lifetime=_lifetime(layout),
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,  # clients repeat calls themselves, within their deadline
            max_concurrency=COORDINATOR_THREADS,
            scheduling_strategy=here,
        ).remote(layout)
    except ValueError as error:
        raise MemoryServerError(_runs_already(layout.name)) from error


def _start_host(
    layout: Layout,
    settings: ServerSettings,
    encoder: KeyEncoderFactory,
    secret: bytes,
    address: Address,
    places: Mapping[Address, str],
) -> Any:
    groups = {
        "search": SEARCHES_AT_ONCE,
        "control": CONTROL_THREADS,
        "refresh": REFRESH_THREADS,
    }
    node = places[address]
    on_node = sum(place == node for place in places.values())
    limit = settings.memory_limit_bytes
    host: Any = ray.remote(concurrency_groups=groups)(ShardHost)  # type: ignore[call-overload]
    host_settings = HostSettings(
        encoder=encoder,
        secret=secret,
        device="cuda" if settings.gpus_per_shard > 0 else "cpu",
        threads=settings.threads_per_shard,
        memory_limit_bytes=None if limit is None else max(1, limit // on_node),
        queue_limit=settings.queue_limit,
        host=settings.host,
    )
    return host.options(
        name=shard_name(layout.name, *address),
        namespace=NAMESPACE,
        lifetime=_lifetime(layout),
        num_cpus=settings.cpus_per_shard,
        num_gpus=settings.gpus_per_shard,
        resources=dict(settings.resources_per_shard) or None,
        max_restarts=-1,
        max_task_retries=0,
        # If that node is gone Ray takes another one.
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    ).remote(layout, host_settings, shard=address[0], replica=address[1])


def _wait_until_up(addresses: Sequence[Address], actors: Sequence[Any], timeout_s: float) -> None:
    pings = {a.ping.remote(): address for a, address in zip(actors, addresses, strict=True)}
    ready, waiting = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s)
    for reference in ready:
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise original_error(error) from None
        except RayActorError as error:
            raise ShardLost(f"{_named(pings[reference])} could not start: {error}") from error
    if waiting:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        names = ", ".join(_named(pings[reference]) for reference in waiting)
        raise ShardLost(
            f"{names} did not start within {timeout_s:g} s; free CPUs are "
            f"{free.get('CPU', 0.0):g}: lower cpus_per_shard, or free some"
        )


def _named(address: Address) -> str:
    return f"replica {address[1]} of shard {address[0]}"


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor, no_restart=True)


def _runs_already(name: str) -> str:
    return (
        f"a memory named {name!r} runs in this Ray cluster already; attach to it, or choose "
        "another name"
    )
