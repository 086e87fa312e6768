"""What lies where: bytes by part on the fullest GPU of each use, on a node, and on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.planning import sizes
from cluster.planning.sizes import Where
from cluster.planning.wanted import Wanted
from memory_server.shard.free_memory import RESERVE
from trainer.build import count_parameters


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one part in one place. `dropped`: the system may drop them and read them again."""

    name: str
    bytes: int
    dropped: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """One kind of place and what is in it, at its fullest.

    Attributes:
        count: how many such places there are.
        usable: bytes that may be taken in each; 0: not known.
        parts: in the order of the table; `staging` is what a refresh adds to what serves.
    """

    name: str
    count: int
    usable: int
    parts: tuple[Part, ...]

    @property
    def needed(self) -> int:
        """Bytes that must be there."""
        return sum(part.bytes for part in self.parts if not part.dropped)

    @property
    def wished(self) -> int:
        """With what the page cache would hold."""
        return sum(part.bytes for part in self.parts)

    @property
    def largest(self) -> Part:
        """Of those that must be there."""
        return max((part for part in self.parts if not part.dropped), key=lambda p: p.bytes)

    @property
    def fits(self) -> bool:
        return not self.usable or self.needed <= self.usable

    @property
    def headroom(self) -> int:
        """What is left; below 0: what is lacking."""
        return self.usable - self.needed


@dataclass(frozen=True, kw_only=True)
class ShardBytes:
    """Of one shard: what serves, and what a refresh adds until the old epoch is released."""

    keys: Where
    rows: Where
    shared_rows: Where
    codes: Where
    training: Where
    tables: int
    searching: Where
    process: Where


def shard_bytes(wanted: Wanted, *, batch: int) -> ShardBytes:
    """Of the largest shard."""
    rows, width = wanted.rows, wanted.config.model.key_size
    on_gpu, dtype = wanted.shards_on_gpu, wanted.config.memory.key_dtype
    return ShardBytes(
        keys=sizes.keys(rows, width, dtype),
        rows=sizes.rows_on_device(rows, on_gpu=on_gpu, approximate=wanted.approximate),
        shared_rows=sizes.rows_on_host(rows),
        codes=sizes.codes(rows, width, wanted.index, on_gpu=on_gpu),
        training=sizes.codes_in_training(rows, width, wanted.index),
        tables=sizes.tables(wanted.model, wanted.entry_tokens),
        searching=sizes.searching(rows, width, dtype, batch, on_gpu=on_gpu),
        process=Where(
            device=sizes.CUDA_PROCESS_BYTES if on_gpu else 0,
            host=sizes.PROCESS_BYTES + sizes.WEIGHTS_COPIES * sizes.key_weights(wanted.model),
        ),
    )


def places(
    wanted: Wanted, *, gpu_bytes: int, batch: int, refreshed: bool = True
) -> tuple[Place, ...]:
    """Where everything lies.

    Args:
        gpu_bytes: of one GPU. batch: queries that a shard answers at once.
        refreshed: a second epoch is staged beside the one that serves.
    """
    shard = shard_bytes(wanted, batch=batch)
    found: list[Place] = []
    if wanted.trains_on_gpu:
        found.append(_trainer_gpu(wanted, gpu_bytes))
    if wanted.shards_on_gpu:
        found.append(_shard_gpu(wanted, shard, gpu_bytes, refreshed=refreshed))
    if wanted.shares_gpus:
        parts = tuple(part for place in found for part in place.parts)
        found = [replace(found[0], name="GPU of a trainer and shards", parts=parts)]
    found.append(_node(wanted, shard, refreshed=refreshed))
    stored = sizes.store(wanted.entries, wanted.entry_tokens, wanted.vocabulary, wanted.text_bytes)
    parameters = 0 if wanted.local else count_parameters(wanted.model)
    checkpoint = 0 if wanted.local else 12 * parameters + sizes.key_weights(wanted.model)
    keep = wanted.config.checkpoint.keep + 1  # one more while it is written
    found.append(
        Place(
            name="disk that all nodes see",
            count=1,
            usable=0,
            parts=_some(
                Part(name="store: tokens, ids, texts", bytes=stored),
                # As `pluglm doctor` reckons: weights, two moments, the key weights once more.
                Part(name="checkpoints", bytes=checkpoint * keep),
            ),
        )
    )
    return tuple(found)


def _trainer_gpu(wanted: Wanted, gpu_bytes: int) -> Place:
    trainer = _trainer(wanted)
    return Place(
        name="GPU of a trainer",
        count=wanted.config.runtime.trainers,
        usable=int(gpu_bytes * (1 - RESERVE)),
        parts=_some(
            Part(name="weights, gradients, optimizer", bytes=trainer.state.device),
            Part(name="gradients in reduction", bytes=trainer.buckets.device),
            Part(name="activations", bytes=trainer.activations.device),
            Part(name="CUDA", bytes=sizes.CUDA_PROCESS_BYTES),
        ),
    )


def _shard_gpu(wanted: Wanted, shard: ShardBytes, gpu_bytes: int, *, refreshed: bool) -> Place:
    held = wanted.shards_per_gpu
    staged = shard.rows.device  # an edit's epoch shares the keys, not its list of rows
    if refreshed:
        staged += shard.keys.device + shard.codes.device + shard.tables
    return Place(
        name="GPU of shards",
        count=wanted.shard_gpus,
        usable=int(gpu_bytes * (1 - RESERVE)),
        parts=_some(
            Part(name="keys", bytes=held * shard.keys.device),
            Part(name="ids, documents, marks", bytes=held * shard.rows.device),
            Part(name="index codes", bytes=held * shard.codes.device),
            Part(name="key tables", bytes=held * shard.tables),
            Part(name=_staging(refreshed), bytes=held * staged),
            Part(name="searching", bytes=held * shard.searching.device),
            Part(name="CUDA", bytes=held * shard.process.device),
        ),
    )


def _node(wanted: Wanted, shard: ShardBytes, *, refreshed: bool) -> Place:
    """The memory of one node: of its shards, and of its trainers."""
    held, on_gpu = wanted.shards_per_node, wanted.shards_on_gpu
    near = 0 if on_gpu else held  # shards whose keys are in this memory
    keys, rows, codes = (part.device * near for part in (shard.keys, shard.rows, shard.codes))
    codes += held * shard.codes.host
    # One file for all shards of the node; each epoch's weights have their own.
    tables = 0 if on_gpu else shard.tables
    listed = rows + held * shard.shared_rows.host
    staging = listed  # an edit's epoch shares the keys, not its list of rows
    if refreshed:
        staging += keys + codes + tables + held * shard.training.host
    trainer = _trainer(wanted)
    trainers = 0 if wanted.trains_on_gpu else wanted.trainers_per_node
    state = trainers * trainer.state.device + wanted.trainers_per_node * trainer.state.host
    tokens = sizes.tokens(wanted.rows, wanted.entry_tokens, wanted.vocabulary) * held
    name = "this process" if wanted.local else "node"
    return Place(
        name=name,
        count=wanted.machines.nodes,
        usable=int(wanted.machines.host_bytes * (1 - RESERVE)),
        parts=_some(
            Part(name="keys", bytes=keys),
            Part(name="ids, documents, marks", bytes=listed),
            Part(name="index codes", bytes=codes),
            Part(name="key tables", bytes=tables),
            Part(name=_staging(refreshed), bytes=staging),
            Part(name="searching", bytes=near * shard.searching.device),
            Part(name="shards' processes", bytes=held * shard.process.host),
            Part(name="weights, gradients, optimizer", bytes=state),
            Part(name="gradients in reduction", bytes=trainers * trainer.buckets.device),
            Part(name="activations", bytes=trainers * trainer.activations.device),
            Part(
                name="trainers' processes",
                bytes=wanted.trainers_per_node * sizes.TRAINER_PROCESS_BYTES,
            ),
            Part(name="libraries (page cache)", bytes=sizes.LIBRARIES_BYTES, dropped=True),
            Part(name="tokens (page cache)", bytes=tokens, dropped=True),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TrainerBytes:
    """Of one trainer, on its device; what is offloaded, on the host."""

    state: Where
    buckets: Where
    activations: Where


def _trainer(wanted: Wanted) -> TrainerBytes:
    if wanted.local:
        return TrainerBytes(state=Where(), buckets=Where(), activations=Where())
    config, model = wanted.config, wanted.model
    runtime = config.runtime
    parameters = count_parameters(model)
    state = sizes.trainer_state(
        parameters,
        zero_stage=runtime.zero_stage,
        precision=runtime.precision,
        trainers=runtime.trainers,
        offload_optimizer=runtime.offload_optimizer,
        offload_parameters=runtime.offload_parameters,
    )
    buckets = sizes.gradient_buckets(
        parameters,
        zero_stage=runtime.zero_stage,
        precision=runtime.precision,
        on_gpu=wanted.trains_on_gpu,
    )
    active = sizes.activations(
        model,
        sequences=config.micro_batch_size,
        tokens_each=wanted.sequence_tokens,
        entry_tokens=wanted.entry_tokens,
        masked_share=config.data.mask_probability,
        precision=runtime.precision,
        recomputed=runtime.activation_checkpointing,
    )
    return TrainerBytes(state=state, buckets=buckets, activations=active)


def _staging(refreshed: bool) -> str:
    return "staging (refresh)" if refreshed else "staging (an edit)"


def _some(*parts: Part) -> tuple[Part, ...]:
    """Without those that are empty."""
    return tuple(part for part in parts if part.bytes)
