"""What is to be planned: a configuration, the entries that its memory will hold, the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import PretrainConfig
from memory_server.index.base import IndexSettings
from memory_server.index.factory import FLAT
from memory_server.index.faiss_presets import inverted_lists
from model.config import PlugLMConfig
from trainer.build import model_config

TEXT_BYTES_PER_TOKEN = 5  # of an entry's text, title and source in its store. Assumed.


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a plan; all nodes alike.

    Attributes:
        gpus: in all; 0: CPUs alone. gpus_per_node: on each node but the last.
        nodes: as many as hold the GPUs, or as are given where there is none.
        host_bytes, cores: of each node.
        network_bytes_per_s: of each node, to the others.
    """

    gpus: int
    gpus_per_node: int
    nodes: int
    host_bytes: int
    cores: int
    network_bytes_per_s: float

    def __post_init__(self) -> None:
        if self.gpus and self.nodes * self.gpus_per_node < self.gpus:
            raise ValueError(
                f"{self.nodes} nodes of {self.gpus_per_node} GPUs have not the {self.gpus} GPUs "
                "that are planned with; give more nodes, or leave them out"
            )

    def with_gpus(self, gpus: int) -> Machines:
        """The same nodes, as many as hold so many GPUs."""
        per_node = min(self.gpus_per_node, gpus)
        return replace(self, gpus=gpus, gpus_per_node=per_node, nodes=-(-gpus // per_node))

    def with_nodes(self, nodes: int) -> Machines:
        """So many nodes without GPUs."""
        return replace(self, nodes=nodes)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One plan's question.

    Attributes:
        entries, entry_tokens: N and S of the memory.
        vocabulary: of the tokenizer. sequence_tokens: T of the sequences that are trained on.
        text_bytes: of an entry's text, title and source.
        step_s: seconds of a step without its search, where they are known; None: reckoned.
        local: one process holds the whole memory (`LocalMemory`), and nothing is trained.
    """

    config: PretrainConfig
    machines: Machines
    entries: int
    entry_tokens: int
    vocabulary: int
    sequence_tokens: int
    text_bytes: int
    step_s: float | None = None
    local: bool = False

    def __post_init__(self) -> None:
        shards = self.config.memory.shards
        if shards > self.entries:
            raise ValueError(
                f"memory.shards = {shards}: must be at most the {self.entries:,} entries"
            )
        lists = inverted_lists(self.config.memory.index)
        if lists > self.rows:
            raise ValueError(
                f"memory.index = {self.config.memory.index!r}: has {lists:,} lists for the "
                f"{self.rows:,} entries of a shard; give at most as many lists as entries"
            )
        longest = max(self.sequence_tokens, self.entry_tokens)
        if longest > self.config.model.max_positions:
            raise ValueError(
                f"model.max_positions = {self.config.model.max_positions}: must be at least "
                f"{longest}, the longest of --entry-tokens and --sequence-tokens"
            )

    @property
    def index(self) -> IndexSettings:
        memory = self.config.memory
        return IndexSettings(
            kind=memory.index, key_dtype=memory.key_dtype, search=memory.search_params
        )

    @property
    def approximate(self) -> bool:
        return self.config.memory.index != FLAT

    @property
    def shards_on_gpu(self) -> bool:
        return self.config.memory.gpus_per_shard > 0

    @property
    def trains_on_gpu(self) -> bool:
        return self.machines.gpus > 0 and self.config.runtime.device != "cpu" and not self.local

    @property
    def rows(self) -> int:
        """Of the largest shard."""
        return -(-self.entries // self.config.memory.shards)

    @property
    def actors(self) -> int:
        """Shards, replicas counted."""
        return self.config.memory.shards * self.config.memory.replicas

    @property
    def shard_gpus(self) -> int:
        """GPUs that hold shards."""
        share = self.config.memory.gpus_per_shard
        if not share:
            return 0
        if share >= 1:
            return math.ceil(self.actors * share)
        return -(-self.actors // self.shards_per_gpu)

    @property
    def shares_gpus(self) -> bool:
        """Whether shards have what trainers leave of their GPUs."""
        share = self.config.runtime.gpus_per_trainer
        return self.trains_on_gpu and self.shards_on_gpu and share < 1

    @property
    def shards_per_gpu(self) -> int:
        share = self.config.memory.gpus_per_shard
        room = 1 - self.config.runtime.gpus_per_trainer if self.shares_gpus else 1.0
        return max(1, math.floor(room / share + 1e-9)) if share else 0

    @property
    def shards_per_node(self) -> int:
        """On the node that has most, as `memory.placement` deals them."""
        nodes = self.machines.nodes
        return -(-self.actors // nodes) if self.config.memory.placement == "spread" else self.actors

    @property
    def threads_per_shard(self) -> float:
        """Cores that a shard on a CPU has to itself while all of its node work."""
        if self.local:
            return self.machines.cores
        wished = self.shards_per_node * self.config.memory.threads_per_shard
        return min(self.machines.cores, wished) / self.shards_per_node

    @property
    def trainers_per_node(self) -> int:
        return 0 if self.local else -(-self.config.runtime.trainers // self.machines.nodes)

    @property
    def model(self) -> PlugLMConfig:
        return model_config(
            self.config.model,
            vocab_size=self.vocabulary,
            pad_token_id=0,
            top_k=self.config.memory.top_k,
        )


def placed(wanted: Wanted, *, shards_on: str, trainers: int | None = None) -> Wanted:
    """The same with trainers and shards dealt to the machines.

    Shards on GPUs take half of them, one each; on hosts one per node and replica, with the
    node's cores. Trainers take the other GPUs, as many as divide the batch.

    Args:
        shards_on: "gpu" or "host". trainers: so many; None: as said.

    Raises:
        ValueError: shards on GPUs, where there are fewer than two.
    """
    config, machines = wanted.config, wanted.machines
    replicas = config.memory.replicas
    on_gpu = shards_on == "gpu"
    if on_gpu and machines.gpus < 2:
        raise ValueError(
            f"--shards-on gpu needs a GPU for a trainer and one for a shard, but there are "
            f"{machines.gpus}; give more --gpus, or --shards-on host"
        )
    room = machines.gpus // 2 if on_gpu and trainers is None else machines.gpus
    most = trainers or room or machines.nodes
    batch = config.optim.batch_size
    count = next(n for n in range(min(most, batch), 0, -1) if batch % n == 0)
    each = batch // count
    micro = config.runtime.micro_batch_size or each
    micro = next(n for n in range(min(micro, each), 0, -1) if each % n == 0)
    if on_gpu:
        shards = max(1, (machines.gpus - count) // replicas)
        threads = config.memory.threads_per_shard
    else:
        shards = max(1, machines.nodes // replicas)
        # A trainer feeds its GPU with a few cores; without GPUs it computes with half of them.
        spare = 4 * -(-count // machines.nodes) if machines.gpus else machines.cores // 2
        threads = max(1, machines.cores - spare)
    memory: dict[str, Any] = {
        "shards": min(shards, wanted.entries),
        "gpus_per_shard": 1.0 if on_gpu else 0.0,
        "threads_per_shard": threads,
    }
    runtime: dict[str, Any] = {"trainers": count, "micro_batch_size": micro}
    if not machines.gpus:
        each_node = -(-count // machines.nodes)
        runtime["threads_per_trainer"] = max(1, machines.cores // 2 // each_node)
    return replace(
        wanted,
        config=replace(
            config,
            memory=replace(config.memory, **memory),
            runtime=replace(config.runtime, **runtime),
        ),
    )
