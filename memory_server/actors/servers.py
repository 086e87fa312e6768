"""Memories as a whole: how one is begun, which ones run in a cluster, and how one is ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from torch import Tensor

from memory_server.actors.calls import find_actor, is_gone
from memory_server.actors.launch import ServerSettings, end_actors
from memory_server.actors.leader import Leader
from memory_server.actors.names import NAMESPACE, Layout, memory_of
from memory_server.actors.server_book import ServerBook
from memory_server.actors.state import StateDirectory
from memory_server.api import KeyEncoderFactory
from memory_server.errors import CoordinatorLost, MemoryServerError
from memory_server.index.base import IndexSettings
from memory_server.keys.key_sources import tables_pay_from
from memory_server.shard.epochs import EpochBook
from memory_server.store.store import Store

LIST_TIMEOUT_S = 5.0
SHUT_DOWN_TIMEOUT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class FirstEpoch:
    """What a memory begins with. Without weights: what its state directory says was live.

    Attributes:
        book: an empty one, which numbers on from an earlier one, so that a reader of an epoch that
            is gone is never answered from another one with its number.
    """

    weights: Mapping[str, Tensor] | None
    encoder_step: int
    content_version: str | None
    book: ServerBook


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """A memory that runs in the cluster. What its coordinator would know is None if it is silent.

    Attributes:
        state: "serving"; "starting": no epoch is live yet; "not answering".
    """

    name: str
    state: str
    detached: bool | None = None
    store_path: str | None = None
    state_dir: str | None = None
    shards: int | None = None
    replicas: int | None = None
    index: str | None = None
    epoch: int | None = None
    encoder_step: int | None = None
    content_version: str | None = None
    entries: int | None = None


def planned(
    store_path: Path | str,
    settings: ServerSettings,
    *,
    name: str,
    encoder: KeyEncoderFactory,
    index: IndexSettings,
    state_dir: Path | str | None,
    weights: Mapping[str, Tensor] | None,
    encoder_step: int,
    content_version: str | None,
) -> tuple[Layout, FirstEpoch]:
    """Check what a memory is to be, before anything is started.

    Raises:
        ValueError, MemoryServerError: refused. StateNotFound, StateDamaged: no weights are given,
        and none are kept. The store's errors.
    """
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"name={name!r}; a name must not be empty, begin with a dot or hold a /")
    if memory_of(name) != name:
        raise ValueError(f"name={name!r} could be a shard's; do not end it so")
    if not ray.is_initialized():
        raise MemoryServerError("Ray is not running in this process; call ray.init() first")
    remote = "://" in str(store_path)
    location = str(store_path) if remote else str(Path(store_path).resolve())
    store = Store.open(location)
    if state_dir is None and remote:
        raise ValueError(
            f"the store {location} is not on a local filesystem, so state_dir must be given: a "
            "directory that the coordinator's node can write"
        )
    directory = Path(location) / "servers" / name if state_dir is None else Path(state_dir)
    layout = Layout(
        name=name,
        shards=settings.shards,
        replicas=settings.replicas,
        index=index,
        meta=store.meta,
        store_path=location,
        state_dir=str(directory.resolve()),
        detached=settings.detached,
        tables_pay_from=tables_pay_from(
            encoder,
            entry_tokens=store.meta.entry_tokens,
            rescoring=index.key_dtype != "float32",
        ),
    )
    first = _first_epoch(StateDirectory(layout.state_dir), weights, encoder_step, content_version)
    version = store.head() if first.content_version is None else first.content_version
    store.manifest(version)
    return layout, FirstEpoch(
        weights=first.weights,
        encoder_step=first.encoder_step,
        content_version=version,
        book=first.book,
    )


def list_servers() -> list[ServerInfo]:
    """The memories that run in this Ray cluster, by name."""
    names = {memory_of(actor) for actor in _actors()}
    return [_described(name) for name in sorted(names)]


def shut_down(name: str, *, forget: bool) -> None:
    """See `RayMemory.shut_down`."""
    try:
        layout = Leader.find(name, timeout_s=SHUT_DOWN_TIMEOUT_S).attachment.layout
    except CoordinatorLost:
        hosts = [actor for actor in _actors() if actor != name and memory_of(actor) == name]
        if not hosts and is_gone(name):
            raise
        end_actors(name, hosts)
        return
    end_actors(name, layout.host_names)
    state = StateDirectory(layout.state_dir)
    if forget:
        state.remove()
    else:
        state.abandon(keep_live=layout.detached)


def _first_epoch(
    state: StateDirectory,
    weights: Mapping[str, Tensor] | None,
    encoder_step: int,
    content_version: str | None,
) -> FirstEpoch:
    if not state.exists() and weights is not None:
        return FirstEpoch(
            weights=weights,
            encoder_step=encoder_step,
            content_version=content_version,
            book=ServerBook(),
        )
    before = state.before().epochs
    book = ServerBook(
        epochs=EpochBook(last_epoch=before.last_epoch, last_weights=before.last_weights)
    )
    if weights is not None:
        return FirstEpoch(
            weights=weights, encoder_step=encoder_step, content_version=content_version, book=book
        )
    if before.live is None:
        raise MemoryServerError(
            f"no epoch was ever live in the memory of {state.path}; start it with weights"
        )
    plan = before.plans[before.live]
    return FirstEpoch(
        weights=state.load_weights(plan.weights_id),
        encoder_step=plan.encoder_step,
        content_version=content_version or plan.content_version,
        book=book,
    )


def _described(name: str) -> ServerInfo:
    try:
        coordinator = find_actor(name)
        layout = ray.get(coordinator.attach.remote(), timeout=LIST_TIMEOUT_S).layout
    except (ValueError, RayError, MemoryServerError):
        return ServerInfo(name=name, state="not answering")
    info = _info(coordinator)
    return ServerInfo(
        name=name,
        state="starting" if info is None else "serving",
        detached=layout.detached,
        store_path=layout.store_path,
        state_dir=layout.state_dir,
        shards=layout.shards,
        replicas=layout.replicas,
        index=layout.index.describe(),
        epoch=None if info is None else info.epoch,
        encoder_step=None if info is None else info.encoder_step,
        content_version=None if info is None else info.content_version,
        entries=None if info is None else info.entries,
    )


def _info(coordinator: Any) -> Any:
    try:
        return ray.get(coordinator.info.remote(), timeout=LIST_TIMEOUT_S)
    except RayError:  # no epoch is live yet
        return None


def _actors() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
