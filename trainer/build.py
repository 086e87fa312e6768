"""A model from the settings: its shape, its vocabulary and the weights that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from model import PlugLMConfig, PlugLMForMaskedLM, is_key_weight
from trainer.settings import ConfigError, ModelSettings


def model_config(settings: ModelSettings, *, vocab_size: int, pad_token_id: int) -> PlugLMConfig:
    """The model's configuration for a tokenizer's vocabulary."""
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
        memory_init=settings.memory_init,
        memory_beta_init=settings.memory_beta_init,
    )


def build_model(config: PlugLMConfig, *, seed: int, init_from: str = "") -> PlugLMForMaskedLM:
    """Build the model; the same seed gives the same weights in every process.

    Args:
        config: the model's configuration.
        seed: of the random weights; the caller's random state is left as it was.
        init_from: directory of a BERT-like checkpoint whose encoder and embeddings are taken where
            the model has the same parts; empty: everything is random.

    Raises:
        ConfigError: init_from cannot be loaded or has other sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlugLMForMaskedLM(config)
    if init_from:
        _take_bert(model, init_from)
    return model


def key_weights(model: PlugLMForMaskedLM) -> dict[str, Tensor]:
    """Float32 CPU copies of the weights that make the memory's keys."""
    return {
        name: p.detach().to("cpu", torch.float32, copy=True)
        for name, p in model.pluglm.named_parameters()
        if is_key_weight(name, model.config)
    }


def _take_bert(model: PlugLMForMaskedLM, init_from: str) -> None:
    if not (Path(init_from) / "config.json").is_file():
        raise ConfigError(
            f"model.init_from = {init_from}: holds no config.json; give the directory of a "
            "BERT-like checkpoint in transformers' format"
        )
    try:
        source_config = AutoConfig.from_pretrained(init_from)
        if source_config.model_type != "bert":
            raise ConfigError(
                f"model.init_from = {init_from}: is a {source_config.model_type!r} model; only "
                "BERT-like checkpoints can be the start"
            )
        _check_sizes(model.config, source_config, init_from)
        # The pooler belongs to next-sentence prediction; PlugLM has none.
        source = AutoModel.from_pretrained(init_from, add_pooling_layer=False)
    except OSError as error:
        raise ConfigError(f"model.init_from = {init_from}: cannot be loaded: {error}") from error
    with torch.no_grad():
        for ours, theirs in bert_modules(model.config).items():
            given = dict(source.get_submodule(theirs).named_parameters())
            for name, parameter in model.pluglm.get_submodule(ours).named_parameters():
                # The checkpoint may have more positions than this model wants.
                parameter.copy_(given[name][: len(parameter)])


def bert_modules(config: PlugLMConfig) -> dict[str, str]:
    """The modules that a PlugLM shares with BERT: our names to those of `transformers.BertModel`.

    Of a memory layer these are the attention and the LayerNorm of the output: its small FFN and all
    that reads the memory are no part of BERT.
    """
    shared = {"embeddings": "embeddings"}
    for layer in range(config.num_hidden_layers):
        parts = _ATTENTION | {"LayerNorm": "output.LayerNorm"}
        if layer < config.num_hidden_layers - config.num_memory_layers:
            parts |= {"ffn.dense_in": "intermediate.dense", "ffn.dense_out": "output.dense"}
        for ours, theirs in parts.items():
            shared[f"layers.{layer}.{ours}"] = f"encoder.layer.{layer}.{theirs}"
    return shared


_ATTENTION = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.dense": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
}


def _check_sizes(config: PlugLMConfig, source: Any, init_from: str) -> None:
    for ours, setting in (
        ("hidden_size", "model.hidden_size"),
        ("num_attention_heads", "model.num_heads"),
        ("intermediate_size", "model.intermediate_size"),
        ("vocab_size", "the corpus's tokenizer's vocabulary"),
        ("type_vocab_size", "this model's number of token types"),
    ):
        wanted, given = getattr(config, ours), getattr(source, ours)
        if wanted != given:
            raise ConfigError(
                f"model.init_from = {init_from}: its {ours} is {given}, but {setting} is {wanted}; "
                "make them agree"
            )
    for ours, setting in (
        ("max_position_embeddings", "model.max_positions"),
        ("num_hidden_layers", "model.num_layers"),
    ):
        wanted, given = getattr(config, ours), getattr(source, ours)
        if wanted > given:
            raise ConfigError(
                f"model.init_from = {init_from}: its {ours} is {given}, but {setting} is {wanted}; "
                f"lower it to {given} or less"
            )
    if source.hidden_act != "gelu":
        raise ConfigError(
            f"model.init_from = {init_from}: its hidden_act is {source.hidden_act!r}, but this "
            "model computes 'gelu'; give another checkpoint"
        )
