"""The tokenizer has one token per word, and loads as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.world.facts import World
from trainer.world.tokenizer import (
    ENTRY_TOKENS,
    SEQUENCE_TOKENS,
    VOCABULARY,
    entry_tokens,
    question_tokens,
    save_world_tokenizer,
    world_tokenizer,
)

FACTS = World(0, 0).facts


def test_it_loads_as_any_tokenizer_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    fingerprint = save_world_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint == tokenizer_fingerprint(loaded) == tokenizer_fingerprint(world_tokenizer())
    assert load_tokenizer(tmp_path).convert_ids_to_tokens(range(len(VOCABULARY))) == list(
        VOCABULARY
    )
    assert len(loaded) == len(VOCABULARY) == 195


def test_texts_become_the_arrays_that_training_uses() -> None:
    tokenizer = world_tokenizer()
    entries = entry_tokens(FACTS)
    assert entries.shape == (500, ENTRY_TOKENS)
    texts = tokenizer([fact.text for fact in FACTS])["input_ids"]
    np.testing.assert_array_equal(entries, np.array(texts)[:, :-1])
    input_ids, labels = question_tokens(entries)
    assert input_ids.shape == labels.shape == (500, SEQUENCE_TOKENS)
    questions = tokenizer([fact.question for fact in FACTS])["input_ids"]
    np.testing.assert_array_equal(input_ids, np.array(questions))
    things = tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert things == [fact.thing for fact in FACTS]
    assert (labels != -100).sum() == 500


def test_words_of_no_world_are_unknown_and_case_does_not_matter() -> None:
    tokenizer = world_tokenizer()
    assert tokenizer.tokenize("Mira sold zebras") == ["mira", "sold", "[UNK]"]
    assert tokenizer.decode(tokenizer("mira sold tobar honey")["input_ids"][1:-1]) == (
        "mira sold tobar honey"
    )
