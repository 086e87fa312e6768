"""Batches cover every epoch exactly, and resume at any place and world size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.cursor import Cursor, batch_epochs, rank_slice
from trainer.data.order import ShuffledOrder, WholeShuffle
from trainer.data.shuffle import permute


def read(cursor: Cursor, steps: int, *, n: int, batch_size: int) -> tuple[np.ndarray, Cursor]:
    parts = []
    for _ in range(steps):
        taken = ShuffledOrder(WholeShuffle(n, 11)).take(cursor, batch_size)
        assert taken.indices.shape == (batch_size,)
        parts.append(taken.indices)
        cursor = taken.cursor
    return np.concatenate(parts), cursor


@given(n=st.integers(1, 60), batch_size=st.integers(1, 100), steps=st.integers(1, 6))
def test_batches_concatenate_to_whole_shuffled_epochs(n: int, batch_size: int, steps: int) -> None:
    stream, cursor = read(Cursor(), steps, n=n, batch_size=batch_size)
    epochs = -(-len(stream) // n)
    wanted = [permute(np.arange(n), n=n, seed=11, epoch=epoch) for epoch in range(epochs)]
    np.testing.assert_array_equal(stream, np.concatenate(wanted)[: len(stream)])
    assert (cursor.epoch, cursor.position) == divmod(steps * batch_size, n)


@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    before=st.integers(0, 6),
    after=st.integers(1, 6),
)
def test_a_resumed_stream_equals_the_uninterrupted_one(
    n: int, batch_size: int, before: int, after: int
) -> None:
    whole, end = read(Cursor(), before + after, n=n, batch_size=batch_size)
    cursor = Cursor()
    if before:
        _, cursor = read(cursor, before, n=n, batch_size=batch_size)
    saved = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    resumed, resumed_end = read(saved, after, n=n, batch_size=batch_size)
    np.testing.assert_array_equal(resumed, whole[before * batch_size :])
    assert resumed_end == end


@given(n=st.integers(1, 40), position=st.integers(0, 39), batch_size=st.integers(1, 90))
def test_epochs_tell_where_a_batch_straddles(n: int, position: int, batch_size: int) -> None:
    position %= n
    epochs = batch_epochs(Cursor(7, position), n=n, batch_size=batch_size)
    indices = ShuffledOrder(WholeShuffle(n, 1)).take(Cursor(7, position), batch_size).indices
    for epoch in np.unique(epochs):
        of_epoch = indices[epochs == epoch]
        begin = position if epoch == 7 else 0
        wanted = permute(np.arange(begin, begin + len(of_epoch)), n=n, seed=1, epoch=int(epoch))
        np.testing.assert_array_equal(of_epoch, wanted)


@given(world_size=st.integers(1, 16), share=st.integers(1, 9))
def test_ranks_share_a_batch_without_gap_or_overlap(world_size: int, share: int) -> None:
    indices = np.arange(world_size * share)
    parts = [rank_slice(indices, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {share}
    np.testing.assert_array_equal(np.concatenate(parts), indices)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 10 sequences does not divide over 4 ranks"):
        rank_slice(np.arange(10), 0, 4)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_an_impossible_rank_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        rank_slice(np.arange(4), rank, world_size)


def test_a_cursor_of_another_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="belongs to another corpus"):
        ShuffledOrder(WholeShuffle(50, 0)).take(Cursor(0, 50), 2)


@pytest.mark.parametrize(
    "values",
    [{}, {"epoch": 0}, {"epoch": 0, "position": "3"}, {"epoch": 0, "position": 1, "more": 2}],
)
def test_a_damaged_cursor_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="data cursor is"):
        Cursor.from_json(values)


def test_a_negative_cursor_is_refused() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        Cursor(0, -1)
