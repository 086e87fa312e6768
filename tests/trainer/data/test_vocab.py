"""The vocabulary's tables say what a WordPiece tokenizer means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trainer.data.vocab import VocabTables, token_rarity, vocab_tables

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "the", "##ing", "london", "."]
TOKENS += ["1987", "##s", "-", "zebra"]


def make_tokenizer(**special: str | None) -> Any:
    model = models.WordPiece({t: i for i, t in enumerate(TOKENS)}, unk_token="[UNK]")
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    kept = {k: v for k, v in {**names, **special}.items() if v is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **kept)


def test_tables_of_a_wordpiece_tokenizer() -> None:
    counts = np.array([900, 5, 100, 100, 0, 0, 9000, 40, 30, 800, 20, 60, 30, 1])
    tables = vocab_tables(make_tokenizer(), counts)
    assert (tables.pad_token_id, tables.mask_token_id, tables.vocab_size) == (0, 4, len(TOKENS))
    special = {TOKENS[i] for i in np.flatnonzero(tables.special)}
    assert special == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"}
    assert [TOKENS[i] for i in np.flatnonzero(~tables.word_start)] == ["##ing", "##s"]
    rarity = dict(zip(TOKENS, tables.rarity.tolist(), strict=True))
    # Stop words, punctuation, special tokens and what was seen once weigh nothing.
    for token in ("the", ".", "-", "zebra", "[PAD]", "[unused1]"):
        assert rarity[token] == 0
    assert rarity["1987"] == 1
    assert 1 > rarity["london"] > rarity["##ing"] > rarity["##s"] > 0


def test_rarity_of_a_zipf_vocabulary() -> None:
    counts = (1e6 / np.arange(1, 8001)).astype(np.int64)
    rarity = token_rarity(counts, np.ones(8000, dtype=np.bool_))
    frequency = counts / counts.sum()
    assert (rarity[frequency > 1e-3] == 0).all()
    assert (np.diff(rarity) >= 0).all()
    assert rarity[-1] == 1
    # Halfway between the stop words' frequency and the lowest, in logarithms, is one half.
    middle = np.exp((np.log(1e-3) + np.log(frequency[-1])) / 2)
    assert rarity[np.abs(frequency - middle).argmin()] == pytest.approx(0.5, abs=0.01)


def test_a_small_even_vocabulary_has_no_stop_words() -> None:
    rarity = token_rarity(np.array([10, 11, 9, 10, 30]), np.ones(5, dtype=np.bool_))
    assert (rarity > 0).all()


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 1, 0]])
def test_counts_too_few_to_tell_give_no_rarity(counts: list[int]) -> None:
    assert (token_rarity(np.array(counts), np.ones(3, dtype=np.bool_)) == 0).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros(5, dtype=np.int64), "the tokenizer has 14 tokens"),
        (np.zeros(14), "must be integers"),
        (np.full(14, -1), "must be >= 0"),
    ],
)
def test_counts_that_are_not_the_tokenizers_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_tables(make_tokenizer(), counts)


@pytest.mark.parametrize("missing", ["mask_token", "pad_token"])
def test_a_tokenizer_that_cannot_mask_is_refused(missing: str) -> None:
    tokenizer = make_tokenizer(**{missing: None})
    with pytest.raises(ValueError, match=f"no {missing}_id"):
        vocab_tables(tokenizer, np.zeros(14, dtype=np.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": 9}, "mask_token_id=9 must be a special token"),
        ({"pad_token_id": 50}, "pad_token_id=50"),
        ({"word_start": np.ones(3, dtype=np.bool_)}, "one length"),
        ({"special": np.ones(50, dtype=np.bool_)}, "every token is special"),
        ({"rarity": np.full(50, np.nan, dtype=np.float32)}, "finite"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(
    vocab_maker: Callable[..., VocabTables], change: dict[str, Any], message: str
) -> None:
    fields = {**vars(vocab_maker()), **change}
    with pytest.raises(ValueError, match=message):
        VocabTables(**fields)
