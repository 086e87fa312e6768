"""The memory of one run: started for it, or a running server that it attaches to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from cluster import checks
from cluster.config import PretrainConfig
from memory_server.actors.client import RayMemory
from memory_server.actors.names import Layout
from model import KeyEncoderFactory, PlugLMConfig
from trainer.settings import ConfigError

_SEAL_TIMEOUT_S = 24 * 3600.0


@contextmanager
def run_memory(
    config: PretrainConfig,
    source: checks.Source,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    start: checks.Start,
) -> Iterator[RayMemory]:
    """The memory, live with the keys of the run's weights, for as long as the block lasts.

    Ray must be running. A server that is attached to goes on when the block ends.

    Raises:
        ConfigError: the named server is of another store or tokenizer.
        CoordinatorLost: there is no server of this name. What `RayMemory.start` raises.
    """
    memory = (
        _attached(config, source, weights, start)
        if config.memory.server
        else _started(config, source, shape, weights, start)
    )
    try:
        yield memory
    finally:
        memory.close()


def _started(
    config: PretrainConfig,
    source: checks.Source,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    start: checks.Start,
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


def _attached(
    config: PretrainConfig,
    source: checks.Source,
    weights: dict[str, Tensor],
    start: checks.Start,
) -> RayMemory:
    """A server, whose content stays as it is: others may have edited it on purpose."""
    settings = config.memory
    memory = RayMemory.attach(
        settings.server, on_lost_shard=settings.on_lost_shard, deadline_s=settings.deadline_s
    )
    try:
        _check_same_store(settings.server, memory.layout, source)
        before = memory.info().epoch
        epoch = memory.stage(encoder_step=start.state.encoder_step, weights=weights)
        memory.wait_sealed(epoch, _SEAL_TIMEOUT_S)
        memory.activate(epoch)
        memory.release(before)
    except BaseException:
        memory.close()
        raise
    return memory


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
