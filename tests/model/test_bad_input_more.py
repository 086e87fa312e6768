"""Further arguments that are refused with a sentence instead of an error of torch's."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from model import (
    PlugLMConfig,
    PlugLMForSequenceClassification,
    PlugLMForTokenClassification,
    PlugLMModel,
)
from tests.reference.worlds import SIZES, Answer, make_world


def answer(ids: Tensor, tokens: Tensor) -> Answer:
    return Answer(ids=ids, tokens=tokens, doc_ids=ids)


def test_double_entries_may_have_ids_of_int32() -> None:
    world = make_world()
    found = world.memory.lookup(torch.randn(1, 8))
    same = answer(found.ids.expand(4, -1), found.tokens.expand(4, -1, -1))
    narrow = answer(same.ids.int(), same.tokens.int())
    wide = world.model(**world.inputs, lookup=lambda _: same).logits
    assert torch.equal(world.model(**world.inputs, lookup=lambda _: narrow).logits, wide)


def test_an_id_that_names_two_entries_is_refused() -> None:
    world = make_world()
    tokens = torch.randint(1, 40, (4, 3, 6))
    local = answer(torch.arange(3).expand(4, -1), tokens)
    with pytest.raises(ValueError, match=r"the id \d for entries with different tokens"):
        world.model(**world.inputs, lookup=lambda _: local)
    # Places without an entry may hold anything.
    nothing = answer(torch.full((4, 3), -1), tokens)
    assert world.model(**world.inputs, lookup=lambda _: nothing).logits.isfinite().all()


def test_an_entry_without_room_for_a_token_is_refused() -> None:
    world = make_world()
    empty = answer(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token"):
        world.model(**world.inputs, lookup=lambda _: empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wanted_BT": torch.ones(4, 8, dtype=torch.bool)}, r"wanted_BT is bool \[4, 8\]"),
        ({"wanted_BT": torch.ones(4, 9)}, r"wanted_BT is float32 .*bool"),
        (
            {"wanted_BT": torch.ones(4, 9, dtype=torch.bool), "first_only": True},
            "both choose positions",
        ),
        ({"lookup": 3}, "lookup is int; allowed: a callable"),
    ],
)
def test_choices_that_do_not_fit_the_batch(options: dict[str, Any], message: str) -> None:
    world = make_world()
    with pytest.raises((TypeError, ValueError), match=message):
        world.model.pluglm(**world.inputs, **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((4, 6), 40), "positive_tokens holds 40; allowed: 0 to 39"),
        (torch.ones(3, 6, dtype=torch.int64), r"positive_tokens is for \[3\] sequences"),
        (torch.ones(4, 13, dtype=torch.int64), r"positive_tokens is .*\[entries, 1 to 12 tokens\]"),
    ],
)
def test_positives_that_do_not_fit(tokens: Tensor, message: str) -> None:
    world = make_world()
    with pytest.raises(ValueError, match=message):
        world.model(
            **world.inputs,
            labels=world.labels,
            lookup=world.memory.lookup,
            positive_tokens=tokens,
            positive_ids=torch.arange(4),
            doc_ids=torch.arange(4),
        )


def test_entries_beyond_the_vocabulary_are_not_encoded() -> None:
    model = make_world().model.pluglm
    for encode in (model.encode_entries, model.entry_keys):
        with pytest.raises(ValueError, match="tokens_nS holds 40; allowed: 0 to 39"):
            encode(torch.full((2, 5), 40))


def test_labels_in_the_padding_are_refused() -> None:
    world = make_world()
    labels = torch.full((4, 9), -100)
    labels[3, 5] = 7
    with pytest.raises(ValueError, match="a label where attention_mask is 0"):
        world.model(**world.inputs, labels=labels)
    tagger = PlugLMForTokenClassification(PlugLMConfig(**SIZES, num_labels=9))
    with pytest.raises(ValueError, match="a label where attention_mask is 0"):
        tagger(**world.inputs, labels=labels)


def test_labels_that_are_a_list_are_refused() -> None:
    judge = PlugLMForSequenceClassification(PlugLMConfig(**SIZES))
    with pytest.raises(TypeError, match="labels is list"):
        judge(torch.ones(2, 3, dtype=torch.int64), labels=[0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"key_size": 1.5}, "key_size is 1.5"),
        ({"fixed_keys": "yes"}, "fixed_keys is 'yes'; allowed: true or false"),
        ({"top_k": True}, "top_k is True"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob is '0.1'; it must be a number"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PlugLMConfig(**(SIZES | settings))


def test_k_is_a_whole_number() -> None:
    class Memory:
        def search(self, queries_BQ: Tensor, k: int) -> None:
            raise AssertionError("never asked")

    with pytest.raises(TypeError, match="k is '3'"):
        PlugLMModel(PlugLMConfig(**SIZES)).attach(Memory(), k="3")  # type: ignore[arg-type]


def test_tuples_and_hidden_states_as_bert_returns_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    world = make_world()
    model = world.model.pluglm.eval()
    whole = model(**world.inputs, lookup=world.memory.lookup, output_hidden_states=True)
    assert len(whole.hidden_states) == 1 + model.config.num_hidden_layers
    assert torch.equal(whole.hidden_states[-1], whole.last_hidden_state)
    assert all(state.shape == (4, 9, 16) for state in whole.hidden_states)
    as_tuple = model(**world.inputs, lookup=world.memory.lookup, return_dict=False)
    assert torch.equal(as_tuple[0], whole.last_hidden_state)
    model.config.return_dict = False
    (logits, *_) = world.model(**world.inputs, lookup=world.memory.lookup)
    assert logits.shape == (4, 9, 40)
