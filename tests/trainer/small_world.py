"""A small world with its memory and an untrained model, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.stream import TrainBatch
from trainer.world.facts import Fact, World
from trainer.world.store import build_world_store
from trainer.world.tokenizer import (
    PAD,
    VOCABULARY,
    entry_tokens,
    question_tokens,
    save_world_tokenizer,
)


@dataclass(frozen=True)
class SmallWorld:
    """Facts, each a document of its own, and a model that can tell their entries apart."""

    facts: tuple[Fact, ...]
    memory: LocalMemory
    model: PlugLMForMaskedLM
    tokenizer: Any

    def batch(self, rows: slice = slice(None)) -> TrainBatch:
        """Questions for facts; the entry of the fact itself is the right one."""
        facts = self.facts[rows]
        entries_NS = entry_tokens(facts)
        input_ids, labels = question_tokens(entries_NS)
        ids = torch.tensor([fact.id for fact in facts])
        return TrainBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy((input_ids != PAD).astype("int64")),
            labels=torch.from_numpy(labels),
            doc_ids=ids,
            positive_tokens=torch.from_numpy(entries_NS),
            positive_ids=ids,
        )


@contextmanager
def small_world(home: Path, *, size: int = 20, **options: object) -> Iterator[SmallWorld]:
    """Make it all below `home`; `options` change the model's configuration."""
    fingerprint = save_world_tokenizer(home / "tokenizer")
    build_world_store(
        home / "store", worlds=1, seed=3, size=size, tokenizer_fingerprint=fingerprint
    )
    config: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "pad_token_id": PAD,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 8,
        "num_memory_layers": 2,
        "memory_ffn_size": 16,
        "key_size": 8,
        "initializer_range": 0.3,
        "query_norm": "layer",
        "value_pooling": "tokens",
    }
    torch.manual_seed(2)
    model = PlugLMForMaskedLM(PlugLMConfig(**(config | options)))
    memory = LocalMemory(
        home / "store",
        encoder=KeyEncoderFactory(model.config.to_dict()),
        weights=model.key_weights(),
    )
    with memory:
        facts = World(3, 0, size).facts
        yield SmallWorld(facts, memory, model, load_tokenizer(home / "tokenizer"))
