"""The shuffle is a bijection that looks random, without a permutation in memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.shuffle import permute

SEEDS = st.integers(-(2**70), 2**70)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_every_item_occurs_exactly_once(n: int, seed: int, epoch: int) -> None:
    shuffled = permute(np.arange(n), n=n, seed=seed, epoch=epoch)
    assert shuffled.dtype == np.int64
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(n))


@given(n=st.integers(1, 2**62), seed=SEEDS, data=st.data())
def test_huge_ranges_stay_in_range_and_distinct(n: int, seed: int, data: st.DataObject) -> None:
    places = st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)
    positions = np.array(data.draw(places), dtype=np.int64)
    shuffled = permute(positions, n=n, seed=seed, epoch=3)
    assert shuffled.min() >= 0
    assert shuffled.max() < n
    assert len(np.unique(shuffled)) == len(positions)


@given(n=st.integers(1, 500), seed=SEEDS, data=st.data())
def test_a_position_does_not_depend_on_the_others_asked(
    n: int, seed: int, data: st.DataObject
) -> None:
    whole = permute(np.arange(n), n=n, seed=seed, epoch=0)
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    np.testing.assert_array_equal(permute(some, n=n, seed=seed, epoch=0), whole[some])


def test_shape_is_kept() -> None:
    positions = np.arange(12).reshape(3, 4)
    assert permute(positions, n=12, seed=1, epoch=0).shape == (3, 4)
    assert permute(positions[:0], n=12, seed=1, epoch=0).shape == (0, 4)


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 10_007
    orders = [
        permute(np.arange(n), n=n, seed=seed, epoch=epoch) for seed in range(3) for epoch in (0, 1)
    ]
    for one, other in itertools.combinations([np.arange(n), *orders], 2):
        # Of two unrelated permutations about one item agrees; correlation is about 1/sqrt(n).
        assert (one == other).sum() < 12
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_neighbours_part() -> None:
    n = 100_000
    shuffled = permute(np.arange(n), n=n, seed=5, epoch=0)
    gaps = np.abs(np.diff(shuffled))
    # For random neighbours the mean distance is n/3, and 1 % of them are closer than about n/200.
    assert abs(gaps.mean() / n - 1 / 3) < 0.01
    assert abs((gaps < n / 200).mean() - 0.01) < 0.002


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7])
def test_small_ranges_reach_every_order_about_equally(n: int) -> None:
    draws = 1200
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), permute(np.arange(n), n=n, seed=seed, epoch=0)] += 1
    expected = draws / n
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.parametrize(("positions", "n"), [([5], 5), ([-1], 5), ([0], 0), ([0], 2**62 + 1)])
def test_out_of_range_is_refused(positions: list[int], n: int) -> None:
    with pytest.raises(ValueError, match=r"outside|must be between"):
        permute(np.array(positions), n=n, seed=0, epoch=0)
