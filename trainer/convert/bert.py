"""A PlugLM that starts from a BERT: what the two share is taken, the memory's parts are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import PlugLMConfig, PlugLMForMaskedLM
from model.bert_weights import check_computable, decoder_differs, take_bert
from trainer.convert.bert_source import fetch_source, open_source
from trainer.convert.errors import ConversionError
from trainer.convert.files import refuse_full, written_beside
from trainer.convert.model_files import write_model
from trainer.convert.report import ConversionReport
from trainer.convert.tokenizer import open_tokenizer
from trainer.corpus.tokenizer import tokenizer_fingerprint

_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "classifier_dropout",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """The memory's parts, which BERT has none of; the defaults are the paper's.

    Attributes:
        memory_ffn_size: None: as wide as the encoder.
        entry_encoder: "word_embedding", or "first_N" with a number N of layers.
    """

    memory_layers: int = 1
    key_size: int = PlugLMConfig.key_size
    memory_ffn_size: int | None = None
    memory_attention: str = PlugLMConfig.memory_attention
    value_pooling: str = PlugLMConfig.value_pooling
    query_norm: str = PlugLMConfig.query_norm
    entry_encoder: str = PlugLMConfig.entry_encoder
    entry_pooler: str = PlugLMConfig.entry_pooler
    query_pooler: str = PlugLMConfig.query_pooler
    memory_init: str = PlugLMConfig.memory_init
    memory_beta_init: float = PlugLMConfig.memory_beta_init
    legacy: bool = False


def convert_bert(
    source: str, out: Path, *, parts: MemoryParts | None = None, seed: int = 0
) -> ConversionReport:
    """Make a PlugLM with a masked-LM head from a BERT-like checkpoint.

    Args:
        source: a directory in transformers' format, which is read offline, or a hub's name.
        out: the model directory to make; written beside and renamed.
        seed: of what is made; the caller's random state is left as it was.

    Raises:
        ConversionError: the source is no usable BERT, or the parts do not go with it.
    """
    refuse_full(out)
    opened = open_source(fetch_source(source), pluglm=False)
    try:
        check_computable(opened.config)
        tensors = opened.tensors()
        config = _config(opened.config, parts or MemoryParts(), tied=not decoder_differs(tensors))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PlugLMForMaskedLM(config)
        weights = take_bert(model, tensors)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
    tokenizer: Any = None
    if any((opened.path / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = open_tokenizer(opened.path, config)
        config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    notes = []
    if tokenizer is None:
        notes.append("the source has no tokenizer, so none was written")
    if "head.dense.weight" in weights.made:
        notes.append(
            "the source has no masked-LM head, so the head was made: its predictions mean nothing "
            "before training"
        )
    if not config.tie_word_embeddings and not config.legacy:
        notes.append("the source's decoder is not its word embedding, so neither is the result's")
    report = ConversionReport(
        source=source,
        out=str(out),
        taken=weights.taken,
        left=weights.left,
        made=weights.made,
        notes=tuple(notes),
    )
    with written_beside(out) as directory:
        write_model(directory, config, model.state_dict(), tokenizer)
        report.write(directory)
    return report


def _config(source: Any, parts: MemoryParts, *, tied: bool) -> PlugLMConfig:
    kind, _, layers = parts.entry_encoder.partition("first_")
    first = not kind and layers.isdecimal()
    if not first and parts.entry_encoder != "word_embedding":
        raise ValueError(
            f"entry_encoder is {parts.entry_encoder!r}; allowed: word_embedding, or first_N such "
            "as first_2"
        )
    ffn = parts.memory_ffn_size
    return PlugLMConfig(
        **{name: getattr(source, name) for name in _SAME},
        num_memory_layers=parts.memory_layers,
        key_size=parts.key_size,
        memory_ffn_size=source.hidden_size if ffn is None else ffn,
        memory_attention=parts.memory_attention,
        value_pooling=parts.value_pooling,
        query_norm=parts.query_norm,
        entry_encoder="first_n" if first else "word_embedding",
        entry_encoder_layers=int(layers) if first else 0,
        entry_pooler=parts.entry_pooler,
        query_pooler=parts.query_pooler,
        memory_init=parts.memory_init,
        memory_beta_init=parts.memory_beta_init,
        legacy=parts.legacy,
        tie_word_embeddings=tied,
    )
