"""Start a memory's actors, all or none, and end them without leaving one."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from memory_server.api import KeyEncoderFactory
from memory_server.errors import MemoryServerError, ShardLost
from memory_server.index import check_index_kind
from memory_server.ray_coordinator import Coordinator, Layout
from memory_server.ray_fanout import original_error
from memory_server.ray_names import NAMESPACE, shard_name
from memory_server.ray_shard import ShardHost
from memory_server.store import Store

log = logging.getLogger(__name__)

SEARCHES_AT_ONCE = 4
CONTROL_THREADS = 2
COORDINATOR_THREADS = 16
KILL_TIMEOUT_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class StartedActors:
    """The actors of one memory, and the content version that its first epoch will hold."""

    layout: Layout
    version: str
    coordinator: Any
    shards: tuple[Any, ...]

    def kill(self) -> None:
        """End all actors; returns when Ray has forgotten their names. Harmless when Ray is down."""
        if not ray.is_initialized():
            return
        name = self.layout.name
        _kill([self.coordinator, *self.shards])
        _wait_until_gone([name, *(shard_name(name, shard) for shard in range(len(self.shards)))])


def start_actors(
    store_path: Path,
    *,
    name: str,
    shards: int,
    encoder: KeyEncoderFactory,
    index: str,
    cpus: float,
    gpus: float,
    threads: int,
    timeout_s: float,
    content_version: str | None,
) -> StartedActors:
    """Start the coordinator and the shards, and wait until all are up.

    Raises:
        ValueError, MemoryServerError, ShardLost: refused, or not up in time; no actor stays.
    """
    check_index_kind(index)
    if shards < 1 or threads < 1 or cpus < 0 or gpus < 0 or not name:
        raise ValueError(
            f"shards={shards} and threads_per_shard={threads} must be at least 1, "
            f"cpus_per_shard={cpus} "
            f"and gpus_per_shard={gpus} not negative, and name={name!r} not empty"
        )
    if not ray.is_initialized():
        raise MemoryServerError("Ray is not running in this process; call ray.init() first")
    path = store_path.resolve()
    store = Store.open(path)
    version = store.head() if content_version is None else content_version
    store.manifest(version)
    _check_resources(shards, cpus, gpus)
    layout = Layout(name=name, shards=shards, index=index, meta=store.meta, store_path=str(path))
    actors: list[Any] = []
    try:
        actors.append(_start_coordinator(layout))
        groups = {"search": SEARCHES_AT_ONCE, "control": CONTROL_THREADS}
        host: Any = ray.remote(concurrency_groups=groups)(ShardHost)  # type: ignore[call-overload]
        for shard in range(shards):
            actors.append(
                host.options(
                    name=shard_name(name, shard),
                    namespace=NAMESPACE,
                    num_cpus=cpus,
                    num_gpus=gpus,
                    max_restarts=-1,
                    max_task_retries=0,
                ).remote(
                    str(path),
                    shards=shards,
                    shard=shard,
                    encoder=encoder,
                    index=index,
                    device="cuda" if gpus > 0 else "cpu",
                    threads=threads,
                    coordinator=name,
                )
            )
        _wait_until_up(actors[1:], timeout_s)
    except BaseException:
        _kill(actors)
        raise
    return StartedActors(
        layout=layout, version=version, coordinator=actors[0], shards=tuple(actors[1:])
    )


def _start_coordinator(layout: Layout) -> Any:
    try:
        return (
            ray.remote(Coordinator)
            .options(
                name=layout.name,
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=COORDINATOR_THREADS,
            )
            .remote(layout)
        )
    except ValueError as error:
        raise MemoryServerError(
            f"a memory named {layout.name!r} runs in this Ray cluster already; attach to it, or "
            "choose "
            "another name"
        ) from error


def _check_resources(shards: int, cpus: float, gpus: float) -> None:
    """Refuse at once what would wait for ever."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, each, option in (("CPU", cpus, "cpus_per_shard"), ("GPU", gpus, "gpus_per_shard")):
        if shards * each > have.get(kind, 0.0):
            raise ValueError(
                f"{shards} shards with {option}={each:g} need {shards * each:g} {kind}, but the "
                "Ray cluster "
                f"has {have.get(kind, 0.0):g}; lower {option} or the number of shards"
            )


def _wait_until_up(shards: list[Any], timeout_s: float) -> None:
    pings = {actor.ping.remote(): shard for shard, actor in enumerate(shards)}
    ready, waiting = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s)
    for reference in ready:
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise original_error(error) from None
        except RayActorError as error:
            raise ShardLost(f"shard {pings[reference]} could not start: {error}") from error
    if waiting:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        names = ", ".join(str(pings[reference]) for reference in waiting)
        raise ShardLost(
            f"shards {names} did not start within {timeout_s:g} s; free CPUs are "
            f"{free.get('CPU', 0.0):g}: lower cpus_per_shard, or free some"
        )


def _kill(actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor, no_restart=True)


def _wait_until_gone(names: list[str]) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while names:
        names = [name for name in names if _is_there(name)]
        if names and time.monotonic() >= deadline:
            log.warning("actors still there after %g s: %s", KILL_TIMEOUT_S, ", ".join(names))
            return
        time.sleep(POLL_S if names else 0.0)


def _is_there(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True
