"""Inputs, labels and settings that cannot be are refused before any work, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMConfig
from tests.reference.worlds import SIZES, World, make_world

Change = Callable[[Tensor], Any]


def put(value: float) -> Change:
    """One number of the tensor is another."""

    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[-1, -1] = value
        return changed

    return change


def refused(world: World, error: type[Exception], message: str, **given: Any) -> None:
    """The pass raises, and has asked no memory and moved no statistics before."""
    model = world.model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    world.memory.calls.clear()
    with pytest.raises(error, match=message):
        model(**(world.inputs | world.targets | given), lookup=world.memory.lookup)
    assert not world.memory.calls
    assert all(torch.equal(buffer, before[n]) for n, buffer in model.named_buffers())


INPUTS: dict[str, tuple[str, Change, type[Exception], str]] = {
    "no-batch": (
        "input_ids",
        lambda x: x[0],
        ValueError,
        r"input_ids.*\[9\].*allowed.*\[sequences",
    ),
    "three-dimensions": ("input_ids", lambda x: x[None], ValueError, r"input_ids.*\[1, 4, 9\]"),
    "no-tensor": ("input_ids", lambda x: x.tolist(), TypeError, "input_ids is list.*int64"),
    "floats": ("input_ids", lambda x: x.float(), TypeError, "input_ids.*float32.*int64"),
    "booleans": ("input_ids", lambda x: x.bool(), TypeError, "input_ids.*bool.*int64"),
    "beyond-vocabulary": ("input_ids", put(40), ValueError, "input_ids.*40.*0 to 39"),
    "negative": ("input_ids", put(-1), ValueError, "input_ids.*-1.*0 to 39"),
    "no-tokens": ("input_ids", lambda x: x[:, :0], ValueError, r"input_ids.*\[4, 0\].*at least"),
    "type-beyond": ("token_type_ids", put(2), ValueError, "token_type_ids.*2.*0 to 1"),
    "type-negative": ("token_type_ids", put(-1), ValueError, "token_type_ids.*-1.*0 to 1"),
    "type-shape": (
        "token_type_ids",
        lambda x: x[:, :8],
        ValueError,
        r"token_type_ids.*\[4, 8\].*\[4, 9\]",
    ),
    "type-dtype": ("token_type_ids", lambda x: x.double(), TypeError, "token_type_ids.*float64"),
    "mask-shape": (
        "attention_mask",
        lambda x: x[:, :8],
        ValueError,
        r"attention_mask.*\[4, 8\].*\[4, 9\]",
    ),
    "mask-of-heads": (
        "attention_mask",
        lambda x: x[:, None, None],
        ValueError,
        r"attention_mask.*\[4, 1, 1, 9\]",
    ),
    "mask-of-two": ("attention_mask", put(2), ValueError, "attention_mask.*2.*0 and 1"),
    "mask-additive": (
        "attention_mask",
        lambda x: (1 - x).double() * -10000,
        ValueError,
        "attention_mask.*-10000.*0 and 1",
    ),
    "mask-nan": (
        "attention_mask",
        lambda x: put(float("nan"))(x.double()),
        ValueError,
        "attention_mask.*nan",
    ),
    "mask-no-tensor": ("attention_mask", lambda x: x.tolist(), TypeError, "attention_mask is list"),
}


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_do_not_fit_are_refused(case: str, unpad: bool) -> None:
    name, change, error, message = INPUTS[case]
    world = make_world(unpad_inputs=unpad)
    refused(world, error, message, **{name: change(world.inputs[name])})


def test_more_tokens_than_positions_are_refused_with_both_numbers() -> None:
    world = make_world()
    long = {name: torch.ones(2, 13, dtype=torch.int64) for name in world.inputs}
    long["token_type_ids"].zero_()
    refused(world, ValueError, r"input_ids.*13 tokens.*12.*max_position_embeddings",
            **long, labels=long["input_ids"])  # fmt: skip


def test_int32_ids_and_other_masks_of_zeros_and_ones_are_welcome() -> None:
    world = make_world()
    wanted = world.model.eval()(**world.inputs, lookup=world.memory.lookup).logits
    for kind in (torch.bool, torch.int32, torch.float32, torch.uint8):
        given = world.model(
            world.inputs["input_ids"].int(),
            world.inputs["attention_mask"].to(kind),
            world.inputs["token_type_ids"].int(),
            lookup=world.memory.lookup,
        ).logits
        assert torch.equal(given, wanted)


LABELS: dict[str, tuple[dict[str, Any], str, Change, type[Exception], str]] = {
    "masked-lm-beyond": ({}, "labels", put(40), ValueError, "labels.*40.*0 to 39.*-100"),
    "masked-lm-minus-one": ({}, "labels", put(-1), ValueError, "labels.*-1.*0 to 39.*-100"),
    "masked-lm-legacy": (
        {"legacy": True},
        "labels",
        put(-100),
        ValueError,
        "labels.*-100.*0 to 39.*-1",
    ),
    "masked-lm-shape": (
        {},
        "labels",
        lambda x: x[:, :8],
        ValueError,
        r"labels.*\[4, 8\].*\[4, 9\]",
    ),
    "masked-lm-dtype": ({}, "labels", lambda x: x.double(), TypeError, "labels.*float64.*int64"),
    "class-beyond": (
        {"task": "sequence", "num_labels": 3, "problem_type": "single_label_classification"},
        "labels",
        lambda x: x + 1,
        ValueError,
        "labels.*3.*0 to 2",
    ),
    "class-shape": (
        {"task": "sequence", "num_labels": 3, "problem_type": "single_label_classification"},
        "labels",
        lambda x: x[:3],
        ValueError,
        r"labels.*\[3\].*\[4\]",
    ),
    "class-as-number": (
        {"task": "sequence", "num_labels": 3, "problem_type": "single_label_classification"},
        "labels",
        lambda x: x.double(),
        TypeError,
        "labels.*float64.*int64",
    ),
    "number-shape": (
        {"task": "sequence", "num_labels": 1, "problem_type": "regression"},
        "labels",
        lambda x: x[:3],
        ValueError,
        r"labels.*\[3\].*\[4",
    ),
    "number-nan": (
        {"task": "sequence", "num_labels": 1, "problem_type": "regression"},
        "labels",
        lambda x: x * float("nan"),
        ValueError,
        "labels.*(nan|NaN)",
    ),
    "several-shape": (
        {"task": "sequence", "num_labels": 3, "problem_type": "multi_label_classification"},
        "labels",
        lambda x: x[:, :2],
        ValueError,
        r"labels.*\[4, 2\].*\[4, 3\]",
    ),
    "several-beyond": (
        {"task": "sequence", "num_labels": 3, "problem_type": "multi_label_classification"},
        "labels",
        put(1.5),
        ValueError,
        "labels.*1.5.*0 (and|to) 1",
    ),
    "token-class-beyond": (
        {"task": "tokens", "num_labels": 3},
        "labels",
        put(3),
        ValueError,
        "labels.*3.*0 to 2.*-100",
    ),
    "token-class-shape": (
        {"task": "tokens", "num_labels": 3},
        "labels",
        lambda x: x[:, 1:],
        ValueError,
        r"labels.*\[4, 8\].*\[4, 9\]",
    ),
    "span-beyond": (
        {"task": "spans"},
        "end_positions",
        lambda x: x + 9,
        ValueError,
        "end_positions.*14.*0 to 8",
    ),
    "span-in-padding": (
        {"task": "spans"},
        "start_positions",
        lambda x: x + 4,
        ValueError,
        "start_positions.*(padding|attention_mask)",
    ),
    "span-shape": (
        {"task": "spans"},
        "start_positions",
        lambda x: x[:, None],
        ValueError,
        r"start_positions.*\[4, 1\].*\[4\]",
    ),
    "span-alone": (
        {"task": "spans"},
        "start_positions",
        lambda x: None,
        ValueError,
        "start_positions.*end_positions",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_fit_are_refused(case: str) -> None:
    settings, name, change, error, message = LABELS[case]
    world = make_world(**settings)
    refused(world, error, message, **{name: change(world.targets[name])})


def test_a_batch_whose_every_label_is_ignored_has_loss_zero() -> None:
    for task in ("sequence", "tokens", "spans"):
        settings = {"num_labels": 3, "problem_type": "single_label_classification"}
        world = make_world(task=task, **(settings if task != "spans" else {}))
        ignored = {name: torch.full_like(x, -100) for name, x in world.targets.items()}
        loss = world.model(**world.inputs, **ignored, lookup=world.memory.lookup).loss
        loss.backward()
        assert float(loss.detach()) == 0.0, task


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"entry_encoder": "first"}, "entry_encoder.*'first'.*word_embedding, first_n"),
    ({"entry_encoder_layers": 1}, "entry_encoder_layers.*1.*word_embedding"),
    ({"entry_encoder": "first_n"}, "entry_encoder_layers.*0.*1 to 2"),
    ({"entry_encoder": "first_n", "entry_encoder_layers": 3}, "entry_encoder_layers.*3.*1 to 2"),
    ({"entry_pooler": "avg"}, "entry_pooler.*'avg'.*attentive, mean, max, cls"),
    ({"query_pooler": "sum"}, "query_pooler.*'sum'.*attentive, mean, max, cls"),
    ({"top_k": 0}, "top_k.*0.*at least 1"),
    ({"type_vocab_size": 0}, "type_vocab_size.*0.*at least 1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings.*0.*at least 1"),
    ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob.*1.0"),
    ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob.*-0.1"),
    ({"classifier_dropout": 2}, "classifier_dropout.*2"),
    ({"pad_token_id": 40}, "pad_token_id.*40.*0 to 39"),
    ({"layer_norm_eps": 0.0}, "layer_norm_eps.*0.*more than 0"),
    ({"layer_norm_eps": -1e-5}, "layer_norm_eps.*-1e-05.*more than 0"),
    ({"initializer_range": -1.0}, "initializer_range.*-1"),
    ({"memory_beta_init": float("nan")}, "memory_beta_init.*nan"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda v: str(v))
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlugLMConfig(**(SIZES | settings))
