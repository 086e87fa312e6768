"""The published checkpoints' configuration as a `PlugLMConfig`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from model.config import PlugLMConfig

_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "num_memory_layers",
    "classifier_dropout",
)  # fmt: skip
_RENAMED = {
    "key_size": "query_size",
    "memory_ffn_size": "memory_layer_ffn_dim",
    "memory_attention": "knowledge_attention_type",
    "top_k": "memory_k",
    "fixed_keys": "fix_keys",
    "fixed_values": "fix_values",
}
# What the published code takes for a setting that its JSON does not name.
_THEIR_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "type_vocab_size": 2,
    "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "position_embedding_type": "absolute", "use_cache": True, "classifier_dropout": None,
    "memory_k": 5, "query_size": 128, "tokenized_document_path": None, "fix_keys": False,
    "fix_values": False, "knowledge_attention_type": "multi_head",
    "memory_pooler_type": "attentive", "query_batchnorm": True, "memory_layer_ffn_dim": 768,
    "num_memory_layers": 6, "init_from_bert": False, "pretrained_bert_path": None,
    "document_encoder_type": "word_embedding", "document_encoder_pooler_type": "attentive",
    "return_I": False,
}  # fmt: skip
# Settings of runs, or of training by the published code: the model is the same without them.
_WITHOUT_EFFECT = frozenset(
    {"use_cache", "tokenized_document_path", "init_from_bert", "pretrained_bert_path", "return_I"}
)
_POOLERS = {"attentive": "attentive", "avg": "mean", "max": "max", "cls": "cls"}


def config_from_published(raw: Mapping[str, Any]) -> PlugLMConfig:
    """The configuration of a published checkpoint, in legacy layout.

    Args:
        raw: its JSON: the settings themselves, or a run's, which keeps them as `model_args`.

    Raises:
        ValueError: a setting is out of range, or describes what the published code cannot compute.
    """
    inner = raw.get("model_args", raw)
    if not isinstance(inner, Mapping) or not any(name in inner for name in _THEIR_DEFAULTS):
        raise ValueError(
            "holds no settings of a published model (such as num_memory_layers, or model_args "
            "around them)"
        )
    given = _THEIR_DEFAULTS | {n: v for n, v in inner.items() if n in _THEIR_DEFAULTS}
    for name, default in _THEIR_DEFAULTS.items():
        _check_type(name, given[name], default)
    _require(given, "hidden_act", "gelu")
    _require(given, "position_embedding_type", "absolute")
    if given["knowledge_attention_type"] == "single_head":
        raise ValueError(
            "knowledge_attention_type is 'single_head', which the published code cannot compute "
            "(its shapes do not fit); checkpoints are 'multi_head' or 'sentence_level'"
        )
    if given["num_memory_layers"] < 1:
        raise ValueError(
            f"num_memory_layers is {given['num_memory_layers']}; a published model has at least 1: "
            "for a plain BERT use `pluglm convert bert`"
        )
    settings = {ours: given[ours] for ours in _SAME}
    settings |= {ours: given[theirs] for ours, theirs in _RENAMED.items()}
    settings |= _entry_encoder(given["document_encoder_type"])
    settings["entry_pooler"] = _pooler(given, "document_encoder_pooler_type")
    settings["query_pooler"] = _pooler(given, "memory_pooler_type")
    settings["query_norm"] = "batch" if given["query_batchnorm"] else "none"
    return PlugLMConfig(**settings, legacy=True)


def taken_by_default(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that shape the model and that the JSON does not name, with the value taken.

    Args:
        raw: as for `config_from_published`, which accepted it.
    """
    inner = raw.get("model_args", raw)
    return {
        name: value
        for name, value in _THEIR_DEFAULTS.items()
        if name not in inner and name not in _WITHOUT_EFFECT
    }


def config_to_published(config: PlugLMConfig) -> dict[str, Any]:
    """The settings as the published code reads them.

    Raises:
        ValueError: the published code cannot compute this model; lists why.
    """
    problems = inexpressible(config)
    if problems:
        raise ValueError("; ".join(problems))
    theirs = dict(_THEIR_DEFAULTS)
    theirs |= {name: getattr(config, name) for name in _SAME}
    theirs |= {name: getattr(config, ours) for ours, name in _RENAMED.items()}
    back = {ours: name for name, ours in _POOLERS.items()}
    theirs["document_encoder_pooler_type"] = back[config.entry_pooler]
    theirs["memory_pooler_type"] = back[config.query_pooler]
    theirs["query_batchnorm"] = config.query_norm == "batch"
    if config.entry_encoder == "first_n":
        theirs["document_encoder_type"] = f"first_{config.entry_encoder_layers}"
    return theirs


def inexpressible(config: PlugLMConfig) -> list[str]:
    """What of a model the published code cannot compute, one clause each; empty: nothing."""
    problems = []
    if not config.legacy:
        problems.append(
            "it is no legacy model, so its heads are merged (the published code reshapes them "
            "without a transpose) and its decoder is tied to the word embedding (there it is not)"
        )
    for name, allowed in (
        ("query_norm", ("batch", "none")),
        ("value_pooling", ("shared",)),
        ("memory_attention", ("multi_head", "sentence_level")),
    ):
        given = getattr(config, name)
        if given not in allowed:
            problems.append(
                f"its {name} is {given!r}; the published code has {' and '.join(allowed)} only"
            )
    if not config.num_memory_layers:
        problems.append("it has no memory layer; the published code has at least one")
    return problems


def _entry_encoder(kind: Any) -> dict[str, Any]:
    if kind == "word_embedding":
        return {"entry_encoder": kind, "entry_encoder_layers": 0}
    match = re.fullmatch(r"first_(\d+)", str(kind))
    if match is None:
        raise ValueError(
            f"document_encoder_type is {kind!r}; known are 'word_embedding' and 'first_N'"
        )
    return {"entry_encoder": "first_n", "entry_encoder_layers": int(match[1])}


def _pooler(given: Mapping[str, Any], name: str) -> str:
    if given[name] not in _POOLERS:
        raise ValueError(f"{name} is {given[name]!r}; known are {', '.join(_POOLERS)}")
    return _POOLERS[given[name]]


def _check_type(name: str, given: Any, default: Any) -> None:
    if default is None:
        return
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(given, wanted) or isinstance(given, bool) != isinstance(default, bool):
        raise ValueError(f"{name} is {given!r}; it must be such as {default!r}")


def _require(given: Mapping[str, Any], name: str, only: str) -> None:
    if given[name] != only:
        raise ValueError(f"{name} is {given[name]!r}; this project computes {only!r} only")
