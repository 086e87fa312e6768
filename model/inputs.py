"""What a forward pass refuses before it computes anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import PlugLMConfig


def checked_mask(
    input_ids: Any, attention_mask: Any, token_type_ids: Any, config: PlugLMConfig
) -> Tensor:
    """Check a batch; return its mask as bool [B,T].

    Raises:
        TypeError: not tensors of integers. ValueError: shapes, ids, types or mask are out of range;
            names the argument, what was given and what is allowed.
    """
    check_layout(input_ids, config)
    _check_range("input_ids", input_ids, config.vocab_size, "vocab_size", "another tokenizer's ids")
    if token_type_ids is not None:
        _check_integers("token_type_ids", token_type_ids)
        _check_shape("token_type_ids", token_type_ids, input_ids)
        _check_range(
            "token_type_ids",
            token_type_ids,
            config.type_vocab_size,
            "type_vocab_size",
            "another model's types",
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is {describe(attention_mask)}; allowed: a tensor or None")
    _check_shape("attention_mask", attention_mask, input_ids)
    mask_BT = attention_mask.to(torch.bool)
    if torch.compiler.is_compiling() or attention_mask.dtype == torch.bool:
        return mask_BT
    wrong = attention_mask[mask_BT.to(attention_mask.dtype) != attention_mask]
    if len(wrong):
        raise ValueError(
            f"attention_mask holds {wrong[0].item()}; allowed are 0 and 1: 1 for tokens, 0 for "
            "padding (not the additive mask of 0 and -10000)"
        )
    return mask_BT


def check_wanted(wanted_BT: Any, input_ids: Tensor, *, first_only: bool) -> None:
    """Check a choice of positions.

    Raises:
        TypeError, ValueError: not bool [B,T], or chosen in two ways at once.
    """
    if first_only:
        raise ValueError("wanted_BT and first_only both choose positions; give one of them")
    if not isinstance(wanted_BT, Tensor) or wanted_BT.dtype != torch.bool:
        raise TypeError(f"wanted_BT is {describe(wanted_BT)}; allowed: a tensor of bool")
    _check_shape("wanted_BT", wanted_BT, input_ids)


def check_entries(name: str, tokens_nS: Any, config: PlugLMConfig) -> None:
    """Check tokens of entries.

    Raises:
        TypeError, ValueError: not integers [n,S], longer than the positions, beyond the vocabulary.
    """
    _check_integers(name, tokens_nS)
    longest = config.max_position_embeddings
    if tokens_nS.ndim != 2 or not 1 <= tokens_nS.shape[1] <= longest:
        raise ValueError(
            f"{name} is {describe(tokens_nS)}; allowed: [entries, 1 to {longest} tokens]"
        )
    _check_range(name, tokens_nS, config.vocab_size, "vocab_size", "another tokenizer's ids")


def check_labelled_tokens(labels: Tensor, ignored: int, attention_mask: Tensor | None) -> None:
    """Check that no label stands in the padding, which is not computed.

    Raises:
        ValueError: one does.
    """
    if torch.compiler.is_compiling() or not isinstance(attention_mask, Tensor):
        return
    if attention_mask.shape != labels.shape:
        return  # the encoder refuses the mask itself
    if bool(((labels != ignored) & (attention_mask == 0)).any()):
        if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
            return  # likewise
        raise ValueError(
            f"labels holds a label where attention_mask is 0; padding has the label {ignored}"
        )


def check_layout(input_ids: Any, config: PlugLMConfig) -> None:
    """Check dtype and shape of token ids, without waiting for the device.

    Raises:
        TypeError: no tensor of integers. ValueError: not [B,T], without tokens, or too long.
    """
    _check_integers("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids is {describe(input_ids)}; allowed: [sequences, tokens]; a single sequence "
            "needs a first dimension of 1"
        )
    length, longest = input_ids.shape[1], config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"input_ids has {length} tokens in a row, but the model has {longest} positions "
            f"(max_position_embeddings); cut the sequences to {longest} tokens"
        )
    if not length:
        raise ValueError(
            f"input_ids is {describe(input_ids)}, without any token; a sequence has at least one"
        )


def check_numbers(name: str, labels: Any, shape: torch.Size, kind: str) -> None:
    """Check the targets of a regression, or the 0 and 1 of several labels at once.

    Args:
        name: of the argument; kind: the problem type.
        shape: [B,C] of the logits; [B] is as good where C is 1.

    Raises:
        TypeError, ValueError: names the argument, what was given and what is allowed.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is {describe(labels)}; allowed for {kind}: a tensor of numbers")
    if labels.shape != shape and (shape[1] != 1 or labels.shape != shape[:1]):
        raise ValueError(
            f"{name} is {describe(labels)}; allowed for {kind}: floating point {list(shape)}"
        )
    if torch.compiler.is_compiling() or not labels.numel():
        return
    if not bool(torch.isfinite(labels).all()):
        raise ValueError(f"{name} hold NaN or infinity; allowed for {kind}: finite numbers")
    wrong = labels[(labels < 0) | (labels > 1)]
    if kind == "multi_label_classification" and len(wrong):
        raise ValueError(f"{name} holds {wrong[0].item()}; allowed for {kind}: 0 to 1")


def check_labels(name: str, labels: Any, shape: torch.Size, classes: int, ignored: int) -> None:
    """Check int64 labels of a shape, each `ignored` or from 0 to classes - 1.

    Raises:
        TypeError, ValueError: names the argument, what was given and what is allowed.
    """
    _check_integers(name, labels)
    if labels.shape != shape:
        raise ValueError(f"{name} is {describe(labels)}; allowed: {list(shape)}, as the inputs")
    if torch.compiler.is_compiling():
        return
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"{name} holds {int(wrong[0])}; allowed: 0 to {classes - 1}, or {ignored} where there "
            "is nothing to predict"
        )


def out_of_range(values: Tensor, low: int, high: int) -> int | None:
    """A value outside low..high if there is one; waits for the device.

    Not looked at while a graph is being traced, where values are not known.
    """
    if torch.compiler.is_compiling() or not values.numel():
        return None
    smallest, largest = (int(v) for v in torch.stack(torch.aminmax(values)).tolist())
    if smallest < low:
        return smallest
    return largest if largest > high else None


def describe(value: Any) -> str:
    """A tensor by dtype and shape, anything else by its type, for error messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _check_integers(name: str, value: Any) -> None:
    allowed = (torch.int64, torch.int32)
    if not isinstance(value, Tensor) or value.dtype not in allowed:
        raise TypeError(f"{name} is {describe(value)}; allowed: a tensor of int64 or int32")


def _check_shape(name: str, value: Any, input_ids: Tensor) -> None:
    if value.shape != input_ids.shape:
        raise ValueError(
            f"{name} is {describe(value)}, but input_ids is {describe(input_ids)}; make the shapes "
            "equal"
        )


def _check_range(name: str, value: Tensor, size: int, setting: str, cause: str) -> None:
    bad = out_of_range(value, 0, size - 1)
    if bad is not None:
        raise ValueError(
            f"{name} holds {bad}; allowed: 0 to {size - 1} ({setting} {size}); are these {cause}?"
        )
