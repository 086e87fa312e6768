"""Cuts cover a document exactly once, and leave words whole where they fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.corpus.cutting import covering, cut, drop_short_tail

words = st.lists(st.integers(1, 6), max_size=40).map(
    lambda lengths: np.array(
        [place == 0 for length in lengths for place in range(length)], dtype=np.bool_
    )
)


@given(words, st.integers(1, 12))
def test_every_token_is_in_exactly_one_span_and_none_is_too_long(
    begins_word: np.ndarray, capacity: int
) -> None:
    spans = cut(begins_word, capacity)
    covered = [token for start, end in spans for token in range(start, end)]
    assert covered == list(range(len(begins_word)))
    assert all(1 <= end - start <= capacity for start, end in spans)


@given(words, st.integers(6, 12))
def test_no_span_begins_inside_a_word_that_fits(begins_word: np.ndarray, capacity: int) -> None:
    assert all(begins_word[start] for start, _ in cut(begins_word, capacity))


@given(words, st.integers(6, 12))
def test_spans_are_as_long_as_whole_words_allow(begins_word: np.ndarray, capacity: int) -> None:
    spans = cut(begins_word, capacity)
    for (start, _), (following, end) in pairwise(spans):
        word_ends = np.flatnonzero(np.append(begins_word[following + 1 : end], True))
        assert following + 1 + word_ends[0] - start > capacity  # the next word did not fit


def test_a_word_longer_than_a_span_is_cut_inside() -> None:
    begins_word = np.array([True, True, False, False, False, False, True])
    assert cut(begins_word, 3).tolist() == [[0, 1], [1, 4], [4, 7]]


@given(words, st.integers(1, 12), st.integers(1, 12))
def test_covering_names_exactly_the_entries_that_share_a_token(
    begins_word: np.ndarray, sequence: int, entry: int
) -> None:
    spans, entries = cut(begins_word, sequence), cut(begins_word, entry)
    first, count = covering(spans, entries)
    for (start, end), low, number in zip(spans, first, count, strict=True):
        sharing = [i for i, (a, b) in enumerate(entries) if a < end and start < b]
        assert sharing == list(range(low, low + number))


def test_only_a_short_last_span_is_dropped() -> None:
    spans = np.array([[0, 3], [3, 10], [10, 12]])
    assert drop_short_tail(spans, 3).tolist() == [[0, 3], [3, 10]]
    assert drop_short_tail(spans, 2).tolist() == spans.tolist()
    assert drop_short_tail(spans[:0], 8).tolist() == []


def test_a_span_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        cut(np.ones(3, dtype=np.bool_), 0)
