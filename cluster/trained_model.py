"""An exported model, opened again with the tokenizer that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from cluster.config import ConfigError
from memory_server.errors import TokenizerMismatch
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model in eval mode, on the CPU or a GPU, and its tokenizer."""

    path: Path
    model: PlugLMForMaskedLM
    tokenizer: Any
    fingerprint: str
    device: str

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens."""
        return int(self.model.config.max_position_embeddings)

    def memory(self, store: Path | str, *, domains: Collection[str] = ()) -> LocalMemory:
        """The store's entries with this model's keys, in this process; blocks while they are made.

        Args:
            domains: only entries of these; none named: of all that are plugged.

        Raises:
            TokenizerMismatch: the entries are another tokenizer's. StoreError: no usable store.
            UnknownDomain: one of them is not plugged; names those that are.
            ConfigError: entries longer than the model reads.
        """
        self.check_fits(Store.open(store))
        encoder = KeyEncoderFactory(self.model.config.to_dict(), device=self.device)
        weights = self.model.key_weights()
        return LocalMemory(
            store, encoder=encoder, weights=weights, domains=domains, device=self.device
        )

    def check_fits(self, store: Store) -> None:
        """Refuse a memory whose entries this model cannot read.

        Raises:
            TokenizerMismatch: they are another tokenizer's. ConfigError: they are too long.
        """
        where, meta = f"the memory {store.location}", store.meta
        self.check_fingerprint(meta.tokenizer_fingerprint, where)
        if meta.entry_tokens > self.max_positions:
            raise ConfigError(
                f"{where} has entries of {meta.entry_tokens} tokens, but the model {self.path} "
                f"reads at most {self.max_positions}; build one with --entry-tokens "
                f"{self.max_positions} or less"
            )

    def check_fingerprint(self, fingerprint: str, owner: str) -> None:
        """Refuse what another tokenizer made.

        Raises:
            TokenizerMismatch: names both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise TokenizerMismatch(
                f"{owner} was made with another tokenizer (fingerprint {fingerprint}) than the "
                f"model {self.path} ({self.fingerprint}); take the model that was trained with it, "
                f"or build it again with --tokenizer {self.path}"
            )


def load_trained_model(path: Path | str, *, device: str = "cpu") -> TrainedModel:
    """Open a model that `pluglm pretrain` exported, or any PlugLM saved with its tokenizer.

    Args:
        path: a directory with config.json, model.safetensors and the tokenizer.
        device: "cpu" or "cuda".

    Raises:
        FileNotFoundError: it is not there. ConfigError: no PlugLM with a memory, or damaged.
        CorpusError: the tokenizer cannot be loaded.
    """
    path = Path(path)
    _check_kind(path)
    # Its bars and advice are for people who load models by hand.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        # Its return type leaves out what output_loading_info adds.
        loaded: Any = PlugLMForMaskedLM.from_pretrained(
            path, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"the model {path} cannot be loaded ({_first_line(error)}); restore it from a copy, or "
            "export it again"
        ) from error
    model: PlugLMForMaskedLM = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ConfigError(
            f"the model {path} lacks {len(names)} of its weights, such as {names[0]}; restore it "
            "from a copy, or export it again"
        )
    tokenizer: Any = load_tokenizer(path)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"the model {path} has {model.config.vocab_size} tokens, but the tokenizer beside it "
            f"{len(tokenizer)}; put the tokenizer there that it was trained with"
        )
    nn.Module.to(model, torch.device(device))
    nn.Module.eval(model)
    # Whoever evaluates hands over a lookup, or leaves the memory out on purpose.
    model.attach(None)
    return TrainedModel(
        path=path,
        model=model,
        tokenizer=tokenizer,
        fingerprint=tokenizer_fingerprint(tokenizer),
        device=device,
    )


def _check_kind(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {path} (no config.json); give a directory such as RUN_DIR/model"
        )
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
        layers = raw.get("num_memory_layers", PlugLMConfig.num_memory_layers)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path / 'config.json'} is damaged: {_first_line(error)}") from error
    if kind != PlugLMConfig.model_type:
        raise ConfigError(
            f"the model {path} is a {kind!r} model; give one that `pluglm pretrain` made"
        )
    if not layers:
        raise ConfigError(f"the model {path} has no memory layer, so it reads no memory")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
