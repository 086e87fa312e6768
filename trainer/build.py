"""A model from the settings: its shape, its vocabulary and the weights that it starts from."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from model import PlugLMConfig, PlugLMForMaskedLM
from model.bert_weights import (
    check_bert,
    check_pluglm,
    decoder_differs,
    take_bert,
    take_pluglm,
)
from trainer.convert.bert_source import open_source
from trainer.settings import ConfigError, ModelSettings

log = logging.getLogger(__name__)


def count_parameters(config: PlugLMConfig) -> int:
    """The weights of a model of this shape, without making it."""
    with torch.device("meta"):
        model = PlugLMForMaskedLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def model_config(
    settings: ModelSettings,
    *,
    vocab_size: int,
    pad_token_id: int,
    top_k: int = PlugLMConfig.top_k,
    tokenizer_fingerprint: str = "",
) -> PlugLMConfig:
    """The model's configuration for a tokenizer's vocabulary.

    Args:
        settings: the section `model`.
        vocab_size, pad_token_id: the tokenizer's.
        top_k: the entries that the exported model's `attach` asks for.
        tokenizer_fingerprint: kept with the model, which then refuses another tokenizer's memory.
    """
    return PlugLMConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_positions,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        initializer_range=settings.initializer_range,
        num_memory_layers=settings.memory_layers,
        memory_ffn_size=settings.memory_ffn_size,
        key_size=settings.key_size,
        memory_attention=settings.memory_attention,
        value_pooling=settings.value_pooling,
        query_norm=settings.query_norm,
        entry_encoder=settings.entry_encoder,
        entry_encoder_layers=settings.entry_encoder_layers,
        entry_pooler=settings.entry_pooler,
        query_pooler=settings.query_pooler,
        top_k=top_k,
        tokenizer_fingerprint=tokenizer_fingerprint,
        memory_init=settings.memory_init,
        memory_beta_init=settings.memory_beta_init,
    )


def build_model(config: PlugLMConfig, *, seed: int, init_from: str = "") -> PlugLMForMaskedLM:
    """Build the model; the same seed gives the same weights in every process.

    Args:
        config: the model's configuration.
        seed: of the random weights; the caller's random state is left as it was.
        init_from: directory of a BERT-like checkpoint, whose encoder, embeddings and masked-LM
            head are taken where the model has the same parts, or of a PlugLM, all of which is
            taken; empty: everything is random.

    Raises:
        ConfigError: init_from cannot be loaded or has other sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlugLMForMaskedLM(config)
    # The trainer hands over a lookup with every batch; one without it is meant so.
    model.attach(None)
    if init_from:
        _take_weights(model, init_from)
    return model


def _take_weights(model: PlugLMForMaskedLM, init_from: str) -> None:
    config = model.config
    try:
        source = open_source(Path(init_from))
        if source.model_type == "bert":
            check_bert(config, source.config, _CALLED)
            tensors = source.tensors()
            report = take_bert(model, tensors)
            if config.tie_word_embeddings and decoder_differs(tensors):
                log.warning(
                    "model.init_from = %s: its decoder is not its word embedding, as this model's "
                    "is; the word embedding was taken",
                    init_from,
                )
        else:
            if source.config.legacy:
                raise ConfigError(
                    f"model.init_from = {init_from}: is in the published checkpoints' layout "
                    "(legacy), which is not pre-trained here; fine-tune it, or start from another"
                )
            check_pluglm(config, source.config, _CALLED)
            report = take_pluglm(model, source.tensors())
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.init_from = {init_from}: {error}") from error
    log.info(
        "model.init_from = %s: %d tensors taken, %d left, %d made",
        init_from,
        len(report.taken),
        len(report.left),
        len(report.made),
    )


# What a person calls a size, where it is a setting of another name.
_CALLED = {
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_heads",
    "intermediate_size": "model.intermediate_size",
    "vocab_size": "the corpus's tokenizer's vocabulary",
    "type_vocab_size": "this model's number of token types",
    "max_position_embeddings": "model.max_positions",
    "num_hidden_layers": "model.num_layers",
    "num_memory_layers": "model.memory_layers",
} | {
    name: f"model.{name}"
    for name in (
        "key_size", "memory_ffn_size", "memory_attention", "value_pooling", "query_norm",
        "entry_encoder", "entry_encoder_layers", "entry_pooler", "query_pooler",
    )
}  # fmt: skip
