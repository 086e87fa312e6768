"""A published checkpoint of a tiny size with random numbers, as files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import PlugLMForMaskedLM
from model.published import to_published
from model.published_config import config_from_published

VOCAB, HIDDEN, WIDTH, POSITIONS, ENTRIES, TOKENS = 30, 8, 4, 12, 25, 6
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": POSITIONS,
    "query_size": WIDTH,
    "memory_layer_ffn_dim": 10,
    "num_memory_layers": 1,
    "memory_k": 3,
}


@dataclass(frozen=True)
class PublishedFiles:
    """What a person has on disk."""

    checkpoint: Path
    config: Path
    documents: Path
    keys: Path
    values: Path

    def arrays(self) -> dict[str, Path]:
        """As keyword arguments of the conversion."""
        return {"documents": self.documents, "keys": self.keys, "values": self.values}


def random_state(**changes: Any) -> dict[str, Tensor]:
    """Published names and random tensors, aliases and what belongs to next sentences included."""
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(config_from_published(SETTINGS | changes))
    for value in model.state_dict().values():
        if value.dtype.is_floating_point:
            value.normal_().abs_()  # a variance is positive
        else:
            value.fill_(7)
    published = to_published(model.state_dict(), model.config)
    return published | {"cls.seq_relationship.weight": torch.randn(2, HIDDEN)}


def published_files(directory: Path, **changes: Any) -> PublishedFiles:
    """Write all five files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = PublishedFiles(
        checkpoint=directory / "ckpt_8000.pt",
        config=directory / "config.json",
        documents=directory / "tokenized.npy",
        keys=directory / "keys.npy",
        values=directory / "values.npy",
    )
    torch.save(random_state(**changes), files.checkpoint)
    run = {"data_args": {}, "model_args": SETTINGS | changes, "training_args": {}}
    files.config.write_text(json.dumps(run))
    random = np.random.default_rng(0)
    documents = random.integers(5, VOCAB, (ENTRIES, TOKENS), dtype=np.int16)
    documents[3, 4:] = 0
    documents[7] = 0  # an entry without any token
    np.save(files.documents, documents)
    np.save(files.keys, random.normal(size=(ENTRIES, WIDTH)).astype(np.float16))
    np.save(files.values, random.normal(size=(ENTRIES, HIDDEN)).astype(np.float16))
    return files


def vocabulary_file(path: Path, size: int = VOCAB) -> Path:
    """A WordPiece vocabulary: five special tokens and invented words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{chr(97 + i % 26)}{i}" for i in range(size - len(words))]
    path.write_text("\n".join(words) + "\n")
    return path
