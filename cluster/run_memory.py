"""The memory of one run: started for it, or a running server that it attaches to."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from cluster import checks
from cluster.config import PretrainConfig
from cluster.resources import on_nodes_with
from cluster.starting import Start
from memory_server.actors.client import RayMemory
from memory_server.actors.names import Layout
from memory_server.errors import UnknownEpoch
from memory_server.kept_pin import KeptPin
from model import KeyEncoderFactory, PlugLMConfig
from trainer.corpus.remote import absolute
from trainer.settings import ConfigError

_SEAL_TIMEOUT_S = 24 * 3600.0


class RunMemory:
    """A memory, and the epoch of it that has the run's keys.

    Attributes:
        epoch: which the trainers are to search; others may make another one live.
        content_version: of that epoch.
    """

    def __init__(self, memory: RayMemory, *, own: bool) -> None:
        """`own`: it was started for this run, and nobody else edits or refreshes it."""
        self.memory, self._own = memory, own
        self.epoch = memory.info().epoch
        self.content_version = _content_of(memory, self.epoch)
        self._pin: KeptPin | None = None

    def renew(self, start: Start, weights: dict[str, Tensor]) -> None:
        """Make the keys of these weights live, pinned until trainers pin them. Blocks.

        The content becomes what it was at the start; that of a server stays as it is, because
        others may have edited it on purpose.

        Raises:
            MemoryServerError: they cannot be made.
        """
        memory, before = self.memory, self.memory.info().epoch
        staged = memory.stage(
            encoder_step=start.state.encoder_step,
            weights=weights,
            content_version=start.state.content_version if self._own else None,
        )
        memory.wait_sealed(staged, _SEAL_TIMEOUT_S)
        self.epoch = memory.activate(staged)
        # Others may switch and release epochs; trainers pin it themselves only when they are up.
        pin = KeptPin(memory, self.epoch)
        self.unpin()
        self._pin, self.content_version = pin, _content_of(memory, self.epoch)
        # Of trainers that died, an epoch may be left that nobody waits for any more.
        others = [e.epoch for e in memory.stats().epochs] if self._own else [before]
        for epoch in set(others) - {self.epoch}:
            with contextlib.suppress(UnknownEpoch):  # another run released it meanwhile
                memory.release(epoch)

    def unpin(self) -> None:
        """Let go of the epoch, as far as this process holds it."""
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.close()


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
    own = not config.memory.server
    memory = _started(config, source, shape, weights, start) if own else _attached(config, source)
    try:
        serving = RunMemory(memory, own=own)
        if not own:
            serving.renew(start, weights)
        try:
            yield serving
        finally:
            serving.unpin()
    finally:
        memory.close()


@contextmanager
def attached_memory(config: PretrainConfig, source: checks.Source) -> Iterator[RayMemory]:
    """The server that the config names, as it is; it goes on when the block ends.

    Raises:
        ConfigError: it is of another store or tokenizer. CoordinatorLost: there is none.
    """
    memory = _attached(config, source)
    try:
        yield memory
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
        absolute(str(source.store)),
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
        resources_per_shard=on_nodes_with(settings.node_resource),
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


def _content_of(memory: RayMemory, epoch: int) -> str:
    return next(e.content_version for e in memory.stats().epochs if e.epoch == epoch)


def _check_same_store(server: str, layout: Layout, source: checks.Source) -> None:
    ours = absolute(str(source.store))
    if layout.store_path != ours:
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
