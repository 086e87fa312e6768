"""The tensors of the published checkpoints under this project's names, and back.

A published checkpoint repeats shared tensors under several names, in the order in which its modules
are loaded; when the copies differ, the last one is what the published code computes with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import PlugLMConfig

_LAYER = r"\d+"
_RETRIEVER = "bert.encoder.retriever."
_ENTRIES = "bert.encoder.retriever.document_encoder."

# Ours to published, by the beginning of the name; # is the number of a layer.
PLACES = {
    "pluglm.embeddings.": "bert.embeddings.",
    "pluglm.entry_encoder.key_proj.": f"{_RETRIEVER}key_proj.",
    "pluglm.entry_encoder.value_proj.": f"{_RETRIEVER}value_proj.",
    "pluglm.entry_encoder.pooler.": f"{_ENTRIES}pooler.pooler.",
    "pluglm.layers.#.attention.query.": "bert.encoder.layer.#.attention.self.query.",
    "pluglm.layers.#.attention.key.": "bert.encoder.layer.#.attention.self.key.",
    "pluglm.layers.#.attention.value.": "bert.encoder.layer.#.attention.self.value.",
    "pluglm.layers.#.attention.dense.": "bert.encoder.layer.#.attention.output.dense.",
    "pluglm.layers.#.attention.LayerNorm.": "bert.encoder.layer.#.attention.output.LayerNorm.",
    "head.decoder_bias": "cls.predictions.bias",
    "head.decoder.weight": "cls.predictions.decoder.weight",
    "head.dense.": "cls.predictions.transform.dense.",
    "head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
}
PLAIN_PLACES = {
    "pluglm.layers.#.ffn.dense_in.": "bert.encoder.layer.#.intermediate.dense.",
    "pluglm.layers.#.ffn.dense_out.": "bert.encoder.layer.#.output.dense.",
    "pluglm.layers.#.LayerNorm.": "bert.encoder.layer.#.output.LayerNorm.",
}
MEMORY_PLACES = {
    "pluglm.layers.#.ffn.dense_in.": "bert.encoder.layer.#.ffn.0.",
    "pluglm.layers.#.ffn.dense_out.": "bert.encoder.layer.#.ffn.1.",
    "pluglm.layers.#.LayerNorm.": "bert.encoder.layer.#.LayerNorm.",
    "pluglm.layers.#.pooler.": "bert.encoder.layer.#.memory_layer.pooler.pooler.",
    "pluglm.layers.#.query_proj.": "bert.encoder.layer.#.memory_layer.query_proj.",
    "pluglm.layers.#.query_norm.": "bert.encoder.layer.#.memory_layer.batch_norm.",
    "pluglm.layers.#.knowledge_attention.beta": (
        "bert.encoder.layer.#.memory_layer.know_attn.beta"
    ),
    "pluglm.layers.#.knowledge_attention.": (
        "bert.encoder.layer.#.memory_layer.know_attn.biased_multihead_attn."
    ),
}
# Parts of BERT's pre-training that some checkpoints carry and PlugLM never uses.
_LEFT_OVER = ("cls.seq_relationship.", "bert.pooler.")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TakenState:
    """What was made of a published state.

    Attributes:
        state: this project's names to tensors, every one that the model has.
        taken: this project's names to the published name that each was read from.
        made: names that the checkpoint need not have (projections of fixed keys or values, which
            nothing reads); they are zeros.
        disagreeing: published names of shared tensors whose copies differ from the one taken.
        left: published tensors that the model does not use.
    """

    state: dict[str, Tensor]
    taken: dict[str, str]
    made: tuple[str, ...]
    disagreeing: tuple[str, ...]
    left: dict[str, Tensor]


def our_name(published: str) -> str:
    """The name in `PlugLMForMaskedLM` of a published parameter or BatchNorm buffer.

    Raises:
        ValueError: no such tensor is known (aliases and `position_ids` are not).
    """
    for table in (PLACES, PLAIN_PLACES, MEMORY_PLACES):
        for ours, theirs in table.items():
            renamed = renamed_beginning(published, theirs, ours)
            if renamed is not None:
                return renamed
    raise ValueError(f"no tensor of this model has the published name {published!r}")


def published_name(ours: str, config: PlugLMConfig) -> str:
    """The first of the published names of one of this model's tensors.

    Raises:
        ValueError: the published code has no such tensor.
    """
    layer = re.match(rf"pluglm\.layers\.({_LAYER})\.", ours)
    table = dict(PLACES)
    if layer is not None:
        plain = int(layer[1]) < config.num_hidden_layers - config.num_memory_layers
        table |= PLAIN_PLACES if plain else MEMORY_PLACES
    for mine, theirs in table.items():
        renamed = renamed_beginning(ours, mine, theirs)
        if renamed is not None:
            return renamed
    raise ValueError(f"the published code has no tensor for {ours}")


def published_names(ours: str, config: PlugLMConfig) -> tuple[str, ...]:
    """All published names of one of this model's tensors, in the order in which they are loaded."""
    first = published_name(ours, config)
    if first == "cls.predictions.bias":
        return (first, "cls.predictions.decoder.bias")
    if first.startswith(_RETRIEVER):
        return (first, *_under_memory_layers(first, config))
    if first.startswith("bert.embeddings."):
        if not _encodes_entries(config):
            return (first,)
        alias = _ENTRIES + "embedding." + first.removeprefix("bert.embeddings.")
        return (first, alias, *_under_memory_layers(alias, config))
    layer = re.match(rf"bert\.encoder\.layer\.({_LAYER})\.(.+)", first)
    if layer and int(layer[1]) < config.entry_encoder_layers and _encodes_entries(config):
        # The retriever is built, and loaded, before the layers that it shares.
        alias = f"{_ENTRIES}bert_encoder.{layer[1]}.{layer[2]}"
        return (alias, first, *_under_memory_layers(alias, config))
    return (first,)


def position_names(config: PlugLMConfig) -> tuple[str, ...]:
    """Published names of the buffer that holds 0, 1, 2, ..., one number per position."""
    first = "bert.embeddings.position_ids"
    if not _encodes_entries(config):
        return (first,)
    alias = f"{_ENTRIES}embedding.position_ids"
    return (first, alias, *_under_memory_layers(alias, config))


def our_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without aliases, renamed; the `position_ids` buffer is left out."""
    return {
        our_name(name): value.reshape(()) if name.endswith("num_batches_tracked") else value
        for name, value in published.items()
        if not name.endswith(".position_ids")
    }


def take_published(
    published: Mapping[str, Tensor], config: PlugLMConfig, shapes: Mapping[str, torch.Size]
) -> TakenState:
    """Rename a whole published state, after checking that it is whole.

    Args:
        published: the checkpoint's tensors, aliases included.
        config: of the model, made from the checkpoint's own.
        shapes: of every tensor of the model, under this project's names.

    Raises:
        ValueError: tensors are missing, not known, or of a wrong shape or type; names them.
    """
    names = {ours: published_names(ours, config) for ours in shapes}
    optional = tuple(ours for ours in shapes if may_be_absent(ours, config))
    known = {name for group in names.values() for name in group}
    left = {n: t for n, t in published.items() if n.startswith(_LEFT_OVER)}
    positions = position_names(config)
    problems = _listed(
        "missing",
        (
            published_name(ours, config)
            for ours, group in names.items()
            if ours not in optional and not any(n in published for n in group)
        ),
    )
    problems += _listed(
        "not known to the model that the config describes",
        (n for n in published if n not in known and n not in left and n not in positions),
    )
    problems += _listed(
        "of another shape or type",
        (
            f"{n} (is {published[n].dtype} {list(published[n].shape)}, must be {list(shapes[o])})"
            for o, group in names.items()
            for n in group
            if n in published and not _fits(published[n], shapes[o], o)
        ),
    )
    problems += _listed(
        "not the numbers 0, 1, 2, ... of the positions",
        (
            n
            for n in positions
            if n in published and not _is_count(published[n], config.max_position_embeddings)
        ),
    )
    if problems:
        raise ValueError("; ".join(problems))
    return _taken(published, shapes, names, left | {n: published[n] for n in positions
                                                    if n in published})  # fmt: skip


def to_published(state: Mapping[str, Tensor], config: PlugLMConfig) -> dict[str, Tensor]:
    """Name a model's tensors as the published code does, aliases and positions included.

    A projection that nothing reads (of fixed keys or values) is left out when it is all zeros: that
    is how `take_published` fills in what a checkpoint lacks.

    Raises:
        ValueError: the published code has no such tensor.
    """
    positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
    out: dict[str, Tensor] = dict.fromkeys(position_names(config), positions)
    for ours, value in state.items():
        if may_be_absent(ours, config) and not bool(value.any()):
            continue
        for name in published_names(ours, config):
            out[name] = value.reshape(()) if ours.endswith("num_batches_tracked") else value
    return out


def may_be_absent(ours: str, config: PlugLMConfig) -> bool:
    """Whether the published code makes no such tensor, because keys or values are fixed."""
    entry = "pluglm.entry_encoder."
    return (
        (config.fixed_keys and ours.startswith(f"{entry}key_proj."))
        or (config.fixed_values and ours.startswith(f"{entry}value_proj."))
        or (not _encodes_entries(config) and ours.startswith(f"{entry}pooler."))
    )


def _taken(
    published: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    names: Mapping[str, tuple[str, ...]],
    left: dict[str, Tensor],
) -> TakenState:
    state, taken, made, disagreeing = {}, {}, [], []
    for ours, group in names.items():
        present = [name for name in group if name in published]
        if not present:
            state[ours] = torch.zeros(shapes[ours])
            made.append(ours)
            continue
        taken[ours] = present[-1]
        state[ours] = published[present[-1]].reshape(shapes[ours])
        disagreeing += [n for n in present[:-1] if not _same(published[n], state[ours])]
    return TakenState(
        state=state, taken=taken, made=tuple(made), disagreeing=tuple(disagreeing), left=left
    )


def renamed_beginning(name: str, beginning: str, replacement: str) -> str | None:
    """The name with another beginning, if it has this one; # stands for a layer's number."""
    pattern = re.escape(beginning).replace(r"\#", f"({_LAYER})")
    match = re.match(pattern, name)
    if match is None or (len(match[0]) < len(name) and not beginning.endswith(".")):
        return None
    if beginning.endswith(".") and len(match[0]) == len(name):
        return None
    number = match[1] if "#" in beginning else ""
    return replacement.replace("#", number) + name[len(match[0]) :]


def _under_memory_layers(name: str, config: PlugLMConfig) -> Iterator[str]:
    rest = name.removeprefix(_RETRIEVER)
    for layer in range(config.num_hidden_layers - config.num_memory_layers,
                       config.num_hidden_layers):  # fmt: skip
        yield f"bert.encoder.layer.{layer}.memory_layer.retriever.{rest}"


def _encodes_entries(config: PlugLMConfig) -> bool:
    return not (config.fixed_keys and config.fixed_values)


def _fits(given: Tensor, shape: torch.Size, ours: str) -> bool:
    if ours.endswith("num_batches_tracked"):  # a scalar, which some tools store as a row of one
        return given.numel() == 1 and given.dtype == torch.int64
    return given.shape == shape and given.dtype.is_floating_point


def _is_count(given: Tensor, positions: int) -> bool:
    return given.shape == (1, positions) and bool((given[0] == torch.arange(positions)).all())


def _same(given: Tensor, taken: Tensor) -> bool:
    return given.dtype == taken.dtype and torch.equal(given.reshape(taken.shape), taken)


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    if not found:
        return []
    shown = ", ".join(found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {shown}{more}"]
