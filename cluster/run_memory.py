"""The memory of one run: started for it, or a running server that it attaches to."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluster import checks
from cluster.config import PretrainConfig
from cluster.starting import Start
from memory_server.actors.client import RayMemory
from memory_server.actors.names import Layout
from memory_server.api import EpochPin
from memory_server.errors import UnknownEpoch
from model import KeyEncoderFactory, PlugLMConfig
from trainer.settings import ConfigError

_SEAL_TIMEOUT_S = 24 * 3600.0
_TRAINERS_START_S = 300.0


@dataclass(frozen=True)
class RunMemory:
    """A memory, and the epoch of it that has the run's keys.

    Attributes:
        epoch: which the trainers are to search; others may make another one live.
        content_version: of that epoch.
    """

    memory: RayMemory
    epoch: int
    content_version: str


@contextmanager
def run_memory(
    config: PretrainConfig,
    source: checks.Source,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    start: Start,
) -> Iterator[RunMemory]:
    """The memory, live with the keys of the run's weights, for as long as the block lasts.

    Ray must be running. A server that is attached to goes on when the block ends.

    Raises:
        ConfigError: the named server is of another store or tokenizer.
        CoordinatorLost: there is no server of this name. What `RayMemory.start` raises.
    """
    if not config.memory.server:
        memory = _started(config, source, shape, weights, start)
    else:
        memory = _attached(config, source)
    try:
        if not config.memory.server:
            epoch = memory.info().epoch
            yield RunMemory(memory, epoch, _content_of(memory, epoch))
            return
        with _shown(memory, weights, start) as pin:
            yield RunMemory(memory, pin.epoch, _content_of(memory, pin.epoch))
    finally:
        memory.close()


def _started(
    config: PretrainConfig,
    source: checks.Source,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    start: Start,
) -> RayMemory:
    settings = config.memory
    device = "cuda" if settings.gpus_per_shard > 0 else "cpu"
    return RayMemory.start(
        source.store.resolve(),
        shards=settings.shards,
        replicas=settings.replicas,
        placement=settings.placement,
        encoder=KeyEncoderFactory(shape.to_dict(), device=device),
        weights=weights,
        encoder_step=start.state.encoder_step,
        content_version=start.state.content_version,
        name=f"pluglm-{uuid.uuid4().hex[:12]}",
        index=checks.index_settings(config),
        on_lost_shard=settings.on_lost_shard,
        deadline_s=settings.deadline_s,
        cpus_per_shard=float(settings.threads_per_shard),
        threads_per_shard=settings.threads_per_shard,
        gpus_per_shard=settings.gpus_per_shard,
        # A Ray that is started for this run alone talks to nobody else.
        host="127.0.0.1" if config.cluster.address == "local" else None,
        # In the run's directory, so that a run that is killed leaves nothing in the store.
        state_dir=Path(config.run.dir).resolve() / "memory",
    )


def _attached(config: PretrainConfig, source: checks.Source) -> RayMemory:
    settings = config.memory
    memory = RayMemory.attach(
        settings.server, on_lost_shard=settings.on_lost_shard, deadline_s=settings.deadline_s
    )
    try:
        _check_same_store(settings.server, memory.layout, source)
    except BaseException:
        memory.close()
        raise
    return memory


def _shown(memory: RayMemory, weights: dict[str, Tensor], start: Start) -> EpochPin:
    """Make the run's weights live on a server, and pin the epoch.

    Its content stays as it is: others may have edited it on purpose.
    """
    before = memory.info().epoch
    staged = memory.stage(encoder_step=start.state.encoder_step, weights=weights)
    memory.wait_sealed(staged, _SEAL_TIMEOUT_S)
    epoch = memory.activate(staged)
    # Others may switch and release epochs; until the trainers pin it themselves, this holds it.
    pin = memory.pin(epoch, lease_s=_TRAINERS_START_S)
    with contextlib.suppress(UnknownEpoch):  # another run that began at the same time released it
        memory.release(before)
    return pin


def _content_of(memory: RayMemory, epoch: int) -> str:
    return next(e.content_version for e in memory.stats().epochs if e.epoch == epoch)


def _check_same_store(server: str, layout: Layout, source: checks.Source) -> None:
    ours = str(source.store.resolve())
    if Path(layout.store_path) != Path(ours):
        raise ConfigError(
            f'memory.server = "{server}": it serves the store {layout.store_path}, but this run\'s '
            f"is {ours}; set memory.store to the server's store, or name another server"
        )
    if layout.meta.tokenizer_fingerprint != source.tokenizer_fingerprint:
        raise ConfigError(
            f'memory.server = "{server}": its entries were tokenised by another tokenizer '
            f"(fingerprint {layout.meta.tokenizer_fingerprint}) than the corpus "
            f"({source.tokenizer_fingerprint})"
        )
