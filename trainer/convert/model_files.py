"""A masked-LM model directory, written from its tensors without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM
from trainer.convert.files import save_tensors

WEIGHTS = "model.safetensors"
TIED = "head.decoder.weight"


def shapes_of(config: PlugLMConfig) -> dict[str, torch.Size]:
    """Every tensor of the masked-LM model that a configuration describes; nothing is allocated."""
    with torch.device("meta"):
        return {n: t.shape for n, t in PlugLMForMaskedLM(config).state_dict().items()}


def write_model(
    directory: Path, config: PlugLMConfig, state: Mapping[str, Tensor], tokenizer: Any
) -> None:
    """Write config.json, model.safetensors and, where there is one, the tokenizer.

    The tensors keep their dtype. A decoder that is tied to the word embedding is not written, as
    transformers does.
    """
    config.architectures = [PlugLMForMaskedLM.__name__]
    floating = next(t.dtype for t in state.values() if t.dtype.is_floating_point)
    config.dtype = floating
    config.save_pretrained(directory)
    tied = {TIED} if config.tie_word_embeddings else set()
    save_tensors(directory / WEIGHTS, {n: t for n, t in state.items() if n not in tied})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
