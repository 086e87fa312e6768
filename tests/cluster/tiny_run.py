"""A small corpus, and a run directory with an untrained model, for the tests of the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config import config_from_mapping
from model import PlugLMConfig, PlugLMForMaskedLM
from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.corpus.tokenizer import load_tokenizer

SEQUENCE_TOKENS, ENTRY_TOKENS = 24, 16


@dataclass(frozen=True)
class TinyRun:
    """What is on disk: text, the corpus made from it, and a run with config.toml and model/."""

    text: Path
    corpus: Path
    run: Path

    @property
    def model(self) -> Path:
        return self.run / "model"

    @property
    def store(self) -> Path:
        return self.corpus / "memory"


def make_tiny_run(home: Path) -> TinyRun:
    """Build it all below `home`; the weights are large enough to tell entries apart."""
    text = write_json_lines(home / "articles.jsonl", make_rows(40, seed=3))
    info = build_corpus(
        [text],
        home / "corpus",
        tokenizer="train:300",
        sequence_length=SEQUENCE_TOKENS,
        entry_tokens=ENTRY_TOKENS,
        heldout_fraction=0.3,
        workers=1,
    )
    run = home / "run"
    run.mkdir()
    config = config_from_mapping(
        {
            "run": {"dir": str(run)},
            "data": {"corpus": str(info.path)},
            "model": {"max_positions": 32},
            "memory": {"top_k": 3},
            "evaluate": {"sequences": 12},
        }
    )
    (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    save_tiny_model(run / "model", tokenizer=info.tokenizer_path)
    return TinyRun(text=text, corpus=info.path, run=run)


def save_tiny_model(path: Path, *, tokenizer: Path, **options: object) -> None:
    """Save a model that two memory layers make interesting, and a tokenizer beside it."""
    loaded = load_tokenizer(tokenizer)
    sizes = {
        "vocab_size": len(loaded),
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "num_memory_layers": 2,
        "memory_ffn_size": 16,
        "key_size": 8,
        "initializer_range": 0.3,
        "query_norm": "layer",
        "value_pooling": "tokens",
    }
    torch.manual_seed(5)
    PlugLMForMaskedLM(PlugLMConfig(**(sizes | options))).save_pretrained(path)
    loaded.save_pretrained(path)
