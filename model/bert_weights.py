"""Which weights of a BERT, or of another PlugLM, a PlugLM starts from; and what became of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import PlugLMConfig
from model.masked_lm import PlugLMForMaskedLM
from model.published import PLACES, PLAIN_PLACES, renamed_beginning

_POSITIONS = "pluglm.embeddings.position_embeddings.weight"
_WORDS = "pluglm.embeddings.word_embeddings.weight"
_DECODER = "head.decoder.weight"
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Sizes that a BERT must have in common with the model that it is the start of.
BERT_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "type_vocab_size",
)
# And what another PlugLM must have in common besides.
PLUGLM_SETTINGS = (
    *BERT_SIZES, "num_hidden_layers", "num_memory_layers", "key_size", "memory_ffn_size",
    "memory_attention", "value_pooling", "query_norm", "entry_encoder", "entry_encoder_layers",
    "entry_pooler", "query_pooler", "legacy",
)  # fmt: skip
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """What became of every tensor.

    Attributes:
        taken: this model's name to the source's name of it.
        left: names of the source's tensors that this model has no place for.
        made: names of this model's tensors that the source does not have: as they were made.
    """

    taken: dict[str, str]
    left: tuple[str, ...]
    made: tuple[str, ...]


def bert_name(ours: str, config: PlugLMConfig) -> str | None:
    """The name in `BertForMaskedLM` of one of `PlugLMForMaskedLM`'s tensors, None if BERT has none.

    Of a memory layer BERT has the attention and the LayerNorm of the output: the small FFN and all
    that reads the memory are no part of it.
    """
    layer = re.match(r"pluglm\.layers\.(\d+)\.(\w+)\.", ours)
    first_memory = config.num_hidden_layers - config.num_memory_layers
    if layer and int(layer[1]) >= first_memory and layer[2] not in ("attention", "LayerNorm"):
        return None
    for mine, theirs in (PLACES | PLAIN_PLACES).items():
        renamed = renamed_beginning(ours, mine, theirs)
        if renamed is not None:
            return None if renamed.startswith("bert.encoder.retriever.") else renamed
    return None


def check_bert(config: PlugLMConfig, source: Any, called: Mapping[str, str]) -> None:
    """Refuse a BERT whose parts do not fit into the model.

    Args:
        source: its `BertConfig`.
        called: by the name of a size, what a person calls it; by default the name itself.

    Raises:
        ValueError: names the size, both values and what to do.
    """
    for name in BERT_SIZES:
        _check_equal(name, getattr(config, name), getattr(source, name), called)
    for name in ("max_position_embeddings", "num_hidden_layers"):
        _check_at_most(name, getattr(config, name), getattr(source, name), called)
    check_computable(source)


def check_computable(source: Any) -> None:
    """Refuse a BERT that computes something else.

    Raises:
        ValueError: names the setting.
    """
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
                       ("is_decoder", False)):  # fmt: skip
        given = getattr(source, name, only)
        if given != only:
            raise ValueError(
                f"its {name} is {given!r}, but this model computes {only!r}; give another "
                "checkpoint"
            )


def check_pluglm(config: PlugLMConfig, source: PlugLMConfig, called: Mapping[str, str]) -> None:
    """Refuse a PlugLM whose weights mean something else in the model.

    Raises:
        ValueError: names the setting, both values and what to do.
    """
    for name in PLUGLM_SETTINGS:
        _check_equal(name, getattr(config, name), getattr(source, name), called)
    theirs, ours = source.tokenizer_fingerprint, config.tokenizer_fingerprint
    if theirs and ours:
        _check_equal("tokenizer_fingerprint", ours, theirs, called)
    name = "max_position_embeddings"
    _check_at_most(name, getattr(config, name), getattr(source, name), called)


def decoder_differs(source: Mapping[str, Tensor]) -> bool:
    """Whether a BERT's decoder is another matrix than its word embedding."""
    state = {_standard(name): tensor for name, tensor in source.items()}
    decoder = state.get("cls.predictions.decoder.weight")
    words = state.get("bert.embeddings.word_embeddings.weight")
    return decoder is not None and words is not None and not torch.equal(decoder, words)


def take_bert(model: PlugLMForMaskedLM, source: Mapping[str, Tensor]) -> WeightReport:
    """Copy a BERT's encoder, embeddings and, where present, masked-LM head into the model.

    Args:
        source: tensors of any BERT model class; LayerNorm's may have their old names gamma, beta.

    Raises:
        ValueError: a part of the encoder is missing or of another shape; names the tensors.
    """
    standard = {_standard(name): name for name in source}
    wanted = {ours: bert_name(ours, model.config) for ours in model.state_dict()}
    # One bias of two names, of which this is the one that is computed with where they differ.
    if (bias := standard.get("cls.predictions.decoder.bias")) is not None:
        standard["cls.predictions.bias"] = bias
    has_head = any(name.startswith("cls.predictions.transform.") for name in standard)
    places = {}
    for ours, theirs in wanted.items():
        if theirs is None or (theirs.startswith("cls.") and not has_head):
            continue
        if ours == _DECODER:
            if model.config.tie_word_embeddings:
                continue  # one matrix with the word embedding, which is taken
            if theirs not in standard:
                theirs = "bert.embeddings.word_embeddings.weight"
        places[ours] = standard.get(theirs, theirs)
    return _copy(model, source, places)


def take_pluglm(model: PlugLMForMaskedLM, source: Mapping[str, Tensor]) -> WeightReport:
    """Copy a PlugLM's tensors into the model: all of the encoder, and the head if it is one's own.

    Args:
        source: tensors of any PlugLM class, under this project's names.

    Raises:
        ValueError: a tensor is missing or of another shape; names the tensors.
    """
    tied = model.config.tie_word_embeddings
    own = [n for n in model.state_dict() if not (tied and n == _DECODER)]
    has_head = "head.decoder_bias" in source
    bare = not any(n.startswith("pluglm.") for n in source)  # as PlugLMModel saves itself
    places = {
        n: n.removeprefix("pluglm.") if bare else n
        for n in own
        if n.startswith("pluglm.") or has_head
    }
    return _copy(model, source, places)


def _copy(
    model: PlugLMForMaskedLM, source: Mapping[str, Tensor], places: Mapping[str, str]
) -> WeightReport:
    state = model.state_dict()
    problems = [f"{theirs} is missing" for theirs in places.values() if theirs not in source]
    for ours, theirs in places.items():
        if theirs in source and not _fits(ours, state[ours], source[theirs]):
            problems.append(
                f"{theirs} has shape {list(source[theirs].shape)} instead of "
                f"{list(state[ours].shape)}"
            )
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"its tensors do not fit: {', '.join(problems[:_SHOWN])}{more}")
    with torch.no_grad():
        for ours, theirs in places.items():
            given = source[theirs]
            # The source may have more positions than this model wants.
            state[ours].copy_(given[: len(state[ours])] if ours == _POSITIONS else given)
    tied = {_DECODER} if model.config.tie_word_embeddings else set()
    used = set(places.values())
    return WeightReport(
        taken=dict(places),
        left=tuple(name for name in source if name not in used),
        made=tuple(name for name in state if name not in places and name not in tied),
    )


def _fits(ours: str, wanted: Tensor, given: Tensor) -> bool:
    if ours == _POSITIONS:
        return given.shape[1:] == wanted.shape[1:] and len(given) >= len(wanted)
    return given.shape == wanted.shape


def _standard(name: str) -> str:
    """A tensor's name as `BertForMaskedLM` has it."""
    for old, new in _OLD_NORMS.items():
        name = name.replace(old, new)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _check_equal(name: str, wanted: object, given: object, called: Mapping[str, str]) -> None:
    if wanted != given:
        raise ValueError(
            f"its {name} is {given}, but {called.get(name, name)} is {wanted}; make them agree"
        )


def _check_at_most(name: str, wanted: int, given: int, called: Mapping[str, str]) -> None:
    if wanted > given:
        raise ValueError(
            f"its {name} is {given}, but {called.get(name, name)} is {wanted}; lower it to {given} "
            "or less"
        )


def summarised(names: Iterable[str]) -> list[str]:
    """Names for a person: a module's tensors as one, and its numbers of layers as a range."""
    groups: dict[str, set[int]] = {}
    for name in names:
        module = re.sub(r"\.(weight|bias|running_\w+|num_batches_tracked)$", "", name)
        number = re.search(r"\.(\d+)\.", module)
        pattern = module if number is None else module.replace(number[0], ".#.", 1)
        groups.setdefault(pattern, set()).update([] if number is None else [int(number[1])])
    return [p.replace("#", _ranges(sorted(numbers))) for p, numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(str(number) for number in numbers)
