"""Memory servers of a Ray cluster: started, found by name, ended, and shown new content."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import ray

from cluster.config import ClusterConfig
from cluster.editing.live import check_same_memory, show_version
from cluster.ray_session import ray_session
from cluster.stop import stop_on_signals
from cluster.trained_model import load_trained_model
from memory_server.actors.client import RayMemory
from memory_server.actors.names import memory_of
from memory_server.actors.servers import ServerInfo
from memory_server.api import Memory, MemoryInfo
from memory_server.index.base import IndexSettings
from memory_server.index.factory import check_index
from memory_server.store.store import Store
from model import KeyEncoderFactory

_LOOK_S = 2.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HINT = "or name another one with --address HOST:PORT"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a memory is served; see `RayMemory.serve`.

    Raises:
        ValueError: a name that cannot be one, or a number out of range; before any Ray is asked.
    """

    name: str
    shards: int = 1
    replicas: int = 1
    placement: Literal["spread", "pack"] = "spread"
    index: IndexSettings = field(default_factory=IndexSettings)
    threads_per_shard: int = 1
    gpus_per_shard: float = 0.0
    content_version: str | None = None
    state_dir: Path | None = None
    deadline_s: float = 60.0
    queue_limit: int = 256
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None or memory_of(self.name) != self.name:
            raise ValueError(
                f"{self.name!r} cannot name a memory server: up to 100 letters, digits, '.', '_' "
                "and '-', the first a letter or digit, and no shard's number (-shard-0-0) at the "
                "end"
            )
        gpus = self.gpus_per_shard
        if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(
                f"gpus_per_shard={gpus:g}: give 0, a part of one GPU (such as 0.5), or a whole "
                "number"
            )
        if not 0 < self.deadline_s < math.inf:
            raise ValueError(f"deadline_s={self.deadline_s:g}: give more than 0 seconds")
        for name in ("shards", "replicas", "threads_per_shard", "queue_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise ValueError(f"memory_limit_bytes={self.memory_limit_bytes} must be at least 1")
        check_index(self.index)


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """Be connected to a Ray that runs: the process's own connection, or one for the block.

    Args:
        address: "auto" (the Ray of this machine) or "host:port".

    Raises:
        LaunchError: no Ray answers there. ConfigError: a bad address.
    """
    if ray.is_initialized():
        yield
        return
    with ray_session(ClusterConfig(address=address), cpus=0, otherwise=HINT):
        yield


@contextmanager
def attached(name: str, address: str, *, domains: Collection[str] = ()) -> Iterator[RayMemory]:
    """A running memory server, found by its name; it goes on when the block ends.

    Args:
        domains: only their entries are read; none named: those of all that are plugged.

    Raises:
        LaunchError: no Ray. CoordinatorLost: it has no memory of this name. UnknownDomain.
    """
    with joined_ray(address):
        memory = RayMemory.attach(name, domains=domains)
        try:
            yield memory
        finally:
            memory.close()


def serve(store: Store, model: Path, settings: ServeSettings) -> MemoryInfo:
    """Start a memory's actors in the Ray that this process is connected to; blocks until it is
    live, with the model's keys, and leaves it running.

    Raises:
        TokenizerMismatch: the model's tokenizer is not the memory's.
        ConfigError, FileNotFoundError: no model, or one that cannot read the memory's entries.
        ValueError, MemoryServerError: what `RayMemory.serve` refuses; nothing stays.
    """
    trained = load_trained_model(model)
    trained.check_fits(store)
    device = "cuda" if settings.gpus_per_shard > 0 else "cpu"
    version = settings.content_version
    memory = RayMemory.serve(
        store.location,
        name=settings.name,
        shards=settings.shards,
        replicas=settings.replicas,
        placement=settings.placement,
        encoder=KeyEncoderFactory(trained.model.config.to_dict(), device=device),
        weights=trained.model.key_weights(),
        content_version=None if version is None else store.resolve(version),
        index=settings.index,
        threads_per_shard=settings.threads_per_shard,
        cpus_per_shard=float(settings.threads_per_shard),
        gpus_per_shard=settings.gpus_per_shard,
        state_dir=settings.state_dir,
        deadline_s=settings.deadline_s,
        queue_limit=settings.queue_limit,
        memory_limit_bytes=settings.memory_limit_bytes,
    )
    try:
        return memory.info()
    finally:
        memory.close()


def show(memory: RayMemory, version: str) -> int:
    """Have a server answer from a version of its store; the epoch that is live then.

    "HEAD" means the head or what others show after it; any other name that very version.

    Raises:
        UnknownVersion: there is none. NotYetLive: it could not be staged; says why.
    """
    store = Store.open(memory.layout.store_path)
    check_same_memory(store, memory)
    resolved = store.resolve(version)
    return show_version(store, memory, resolved, exactly=version != "HEAD")


def cancel(memory: Memory, epoch: int) -> int:
    """Give up an epoch that is being staged, or waits to go live; the epoch that is live.

    Raises:
        ValueError: it is the one that answers. UnknownEpoch: there is none of this number.
    """
    live = memory.info().epoch
    if epoch == live:
        raise ValueError(
            f"epoch {epoch} is the one that answers, so it cannot be cancelled; `pluglm memory "
            "show NAME V` has another version answer"
        )
    memory.release(epoch)
    return live


def versions_in_use(memory: RayMemory) -> frozenset[str]:
    """The content versions that a server holds, which `gc` must leave."""
    held = {memory.info().content_version}
    held |= {epoch.content_version for epoch in memory.stats().epochs}
    return frozenset(held)


def serve_in_foreground(
    store: Store, model: Path, settings: ServeSettings, tell: Callable[[MemoryInfo, str], None]
) -> None:
    """Start a Ray on this machine, serve in it, and end both after SIGINT, SIGTERM or `stop`.

    Only Ray's own command can start one that outlives the process that starts it.

    Args:
        tell: called once with Ray's address, when the memory answers.

    Raises:
        LaunchError: this process is connected to a Ray, or none can be started. See `serve`.
    """
    cpus = settings.shards * settings.replicas * settings.threads_per_shard
    with stop_on_signals() as stopping, ray_session(ClusterConfig(address="local"), cpus=cpus):
        stopping.listen()  # Ray has taken SIGTERM for itself
        info = serve(store, model, settings)
        tell(info, str(ray.get_runtime_context().gcs_address))
        stopping.training = True  # from here on a signal is not an error, but the usual end
        while not stopping.event.wait(_LOOK_S):
            if not is_serving(settings.name):
                return
        stop(settings.name)


def servers() -> list[ServerInfo]:
    """The memory servers of the Ray that this process is connected to."""
    return list(RayMemory.list_servers())


def is_serving(name: str) -> bool:
    """Whether a memory of this name is there."""
    return any(server.name == name for server in servers())


def stop(name: str, *, forget: bool = False) -> None:
    """End a memory server. What a restart needs stays, unless `forget`.

    Raises:
        CoordinatorLost: there is none of this name.
    """
    RayMemory.shut_down(name, forget=forget)
