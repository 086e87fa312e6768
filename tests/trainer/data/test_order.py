"""Several corpora by weight: exact shares, whole epochs, and the same wherever one begins."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.cursor import Cursor
from trainer.data.order import (
    FileShuffle,
    MixedOrder,
    ShuffledOrder,
    Taken,
    WholeShuffle,
    order_of,
)

SIZES = (100, 37, 1000)
OFFSETS = np.array([0, 100, 137, 1137])


def mixed(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int) -> MixedOrder:
    shuffles = [WholeShuffle(size, seed + number) for number, size in enumerate(sizes)]
    return MixedOrder(shuffles, weights, seed)


def dataset_of(taken: Taken) -> np.ndarray:
    return np.searchsorted(OFFSETS, taken.indices, side="right") - 1


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1, 1, 2), (1024, 1024, 2048)), ((0.7, 0.2, 0.1), (2867, 819, 410)), ((), None)],
)
def test_every_period_holds_the_exact_shares(
    weights: tuple[float, ...], shares: tuple[int, ...] | None
) -> None:
    order = mixed(SIZES, weights, seed=3)
    expected = shares or np.round(np.array(SIZES) / sum(SIZES) * 4096)
    for start in (0, 4096, 5 * 4096):
        counts = np.bincount(dataset_of(order.take(Cursor(0, start), 4096)), minlength=3)
        assert abs(counts - expected).max() <= 1
        assert counts.sum() == 4096


def test_shares_are_even_within_a_period() -> None:
    order = mixed(SIZES, (1, 1, 2), seed=3)
    for start in range(0, 4096, 256):
        counts = np.bincount(dataset_of(order.take(Cursor(0, start), 256)), minlength=3)
        # Six standard deviations of drawing without an order.
        assert abs(counts - [64, 64, 128]).max() < 48


def test_each_corpus_is_gone_through_in_whole_epochs() -> None:
    taken = mixed(SIZES, (3, 1, 4), seed=5).take(Cursor(), 5000)
    datasets = dataset_of(taken)
    for number, size in enumerate(SIZES):
        mine = taken.indices[datasets == number]
        epochs = taken.epochs[datasets == number]
        assert (np.diff(epochs) >= 0).all()
        passes = [mine[epochs == epoch] for epoch in range(len(mine) // size)]
        for seen in passes:
            assert sorted(seen - OFFSETS[number]) == list(range(size))
        if len(passes) > 1:
            assert (passes[0] != passes[1]).any()


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_resumed_order_continues_exactly(step: int) -> None:
    order = mixed(SIZES, (1, 2, 3), seed=1)
    whole = order.take(Cursor(), 5000)
    cursor, pieces = Cursor(), []
    while cursor.position < 5000:
        # Made anew each time, as in another process.
        taken = mixed(SIZES, (1, 2, 3), seed=1).take(cursor, min(step, 5000 - cursor.position))
        cursor = taken.cursor
        pieces.append(taken)
        if step == 1 and cursor.position == 50:
            break
    indices = np.concatenate([piece.indices for piece in pieces])
    epochs = np.concatenate([piece.epochs for piece in pieces])
    assert (indices == whole.indices[: len(indices)]).all()
    assert (epochs == whole.epochs[: len(epochs)]).all()


def test_another_seed_is_another_order() -> None:
    one, other = (mixed(SIZES, (), seed=s).take(Cursor(), 500).indices for s in (1, 2))
    assert (one != other).mean() > 0.5


@pytest.mark.parametrize(
    ("sizes", "weights", "said"),
    [
        ((5, 5), (1,), "one weight for each"),
        ((5, 0), (), "at least one sequence"),
        ((5, 5), (1, 0), "above 0"),
        ((5, 5), (1, float("nan")), "finite"),
        ((5, 5), (1, 1e-6), "number 2 is less than 1/4096"),
    ],
)
def test_impossible_mixtures_are_refused(
    sizes: tuple[int, ...], weights: tuple[float, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        mixed(sizes, weights, seed=0)


def test_a_cursor_of_one_corpus_is_refused_by_a_mixture() -> None:
    with pytest.raises(ValueError, match="epoch 2, but a mixture"):
        mixed(SIZES, (), seed=0).take(Cursor(2, 5), 4)


def test_one_dataset_is_shuffled_as_ever() -> None:
    taken = ShuffledOrder(WholeShuffle(10, 4)).take(Cursor(0, 7), 8)
    assert taken.epochs.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert taken.cursor == Cursor(1, 5)


@pytest.mark.parametrize("files", [1, 2, 3, 7, 50])
def test_files_are_shuffled_in_groups(files: int) -> None:
    rows = [30, 2, 41, 7, 25, 60, 1]
    starts = np.cumsum([0, *rows])
    shuffle = FileShuffle(rows, files, seed=2)
    assert shuffle.size == sum(rows)
    orders = []
    for epoch in range(3):
        order = shuffle.at(np.arange(shuffle.size), epoch)
        assert sorted(order) == list(range(shuffle.size))
        # Any part of it is the same part, however it is asked for.
        some = np.random.default_rng(epoch).integers(0, shuffle.size, 40)
        assert (shuffle.at(some, epoch) == order[some]).all()
        file = np.searchsorted(starts, order, side="right") - 1
        # Cut behind each group: all of its files are complete, and none is in another.
        begin, groups = 0, []
        while begin < len(order):
            first = np.unique(file, return_index=True)
            later = [f for f, place in zip(*first, strict=True) if place >= begin]
            by_place = sorted(later, key=lambda f: int(np.flatnonzero(file == f)[0]))
            size = next(
                sum(rows[f] for f in by_place[:n])
                for n in range(min(files, len(by_place)), 0, -1)
                if set(file[begin : begin + sum(rows[f] for f in by_place[:n])])
                == set(by_place[:n])
            )
            groups.append(len(set(file[begin : begin + size])))
            begin += size
        assert groups[:-1] == [files] * (len(groups) - 1)
        assert len(groups) == -(-len(rows) // files)
        orders.append(order)
    assert (orders[0] != orders[1]).any()


def test_an_epoch_of_one_or_many_holds_every_sequence() -> None:
    for rows in ([[5, 6]], [[5, 6], [9]]):
        order = order_of(rows, weights=(), files=1, seed=3)
        total = sum(map(sum, rows))
        assert set(order.take(Cursor(), 4096).indices) == set(range(total))
