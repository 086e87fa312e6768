"""Counted reads: a plain Counter's numbers while exact, within their bounds when sampled."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.reads.figures import distribution, share_of_most_read, times_read
from trainer.reads.sample import UNITS, Limits, Reads, at_level, merged, sizes_by_level
from trainer.reads.totals import ReadTotals

ROOMY = Limits(sample=1 << 16, most_read=1 << 10)
SMALL = Limits(sample=64, most_read=8)

Pairs = list[tuple[int, float]]
pairs = st.lists(
    st.tuples(st.integers(0, 200) | st.integers(2**62, 2**63 - 1), st.floats(0, 1, width=32)),
    max_size=120,
)


def reads(given_pairs: Pairs) -> Reads:
    ids = np.array([entry for entry, _ in given_pairs], dtype=np.int64)
    return Reads.of(ids, np.array([share for _, share in given_pairs]))


def skewed(number: int, entries: int, seed: int) -> np.ndarray:
    """Ids of which a few are read very often; no order in them."""
    rng = np.random.default_rng(seed)
    return rng.permutation(entries)[(entries * rng.random(number) ** 4).astype(np.int64)]


def cut(ids: np.ndarray, windows: int) -> list[Reads]:
    return [Reads.of(part, np.full(len(part), 0.25)) for part in np.array_split(ids, windows)]


@settings(deadline=None)
@given(st.lists(pairs, max_size=6))
def test_exact_counts_are_a_plain_counters(windows: list[Pairs]) -> None:
    times, attended = Counter[int](), Counter[int]()
    totals = ReadTotals(ROOMY)
    for window in windows:
        totals.add(reads(window))
        for entry, share in window:
            times[entry] += 1
            attended[entry] += round(share * UNITS)
        assert totals.distinct == len(times)
        assert totals.all_times == sum(times.values())
    whole = totals.whole()
    assert (whole.level, whole.short) == (0, 0)
    assert dict(zip(whole.ids.tolist(), whole.times.tolist(), strict=True)) == times
    assert dict(zip(whole.ids.tolist(), whole.attended.tolist(), strict=True)) == attended
    assert whole.all_attended == sum(attended.values())


@settings(deadline=None)
@given(pairs)
def test_exact_figures_are_a_plain_counters(given_pairs: Pairs) -> None:
    counted = reads(given_pairs)
    times = Counter(entry for entry, _ in given_pairs)
    total = sum(times.values())
    found = distribution(counted, entries=500)
    if not total:
        assert found == {}
        return
    entropy = -sum(c / total * math.log(c / total) for c in times.values())
    wanted = entropy / math.log(min(total, 500)) if total > 1 else 0.0
    assert found["read_evenness"] == pytest.approx(wanted, abs=1e-9)
    assert found["top_read_share"] == max(times.values()) / total
    best = sorted(times.values(), reverse=True)[:5]
    assert share_of_most_read(counted, 5) == pytest.approx(sum(best) / total)
    bins = Counter(int(math.log2(c)) for c in times.values())
    assert {int(math.log2(b["from"])): b["entries"] for b in times_read(counted)} == bins


@pytest.mark.parametrize("windows", [1, 7, 40])
def test_a_sample_does_not_hang_on_how_reads_were_cut(windows: int) -> None:
    ids = skewed(20_000, 5_000, seed=1)
    true = Counter(ids.tolist())
    totals = ReadTotals(SMALL)
    for window in cut(ids, windows):
        totals.add(merged([window], SMALL))
    whole = totals.whole()
    sampled = whole.sampled
    level = whole.level
    every = np.array(sorted(true))
    # The lowest level that fits, all of its entries, each with its exact count.
    assert sizes_by_level(every)[level] <= SMALL.sample < sizes_by_level(every)[level - 1]
    assert whole.ids[sampled].tolist() == every[at_level(every, level)].tolist()
    for entry, times in zip(
        whole.ids[sampled].tolist(), whole.times[sampled].tolist(), strict=True
    ):
        assert times == true[entry]
    assert whole.all_times == 20_000
    assert whole.all_attended == 20_000 * UNITS // 4


@pytest.mark.parametrize("windows", [1, 7, 40])
def test_memory_is_bounded_and_the_most_read_are_known(windows: int) -> None:
    ids = skewed(20_000, 5_000, seed=2)
    true = Counter(ids.tolist())
    totals = ReadTotals(SMALL)
    for window in cut(ids, windows):
        totals.add(merged([window], SMALL))
        whole = totals.whole()
        assert len(whole.ids) <= SMALL.sample + SMALL.most_read
    beside = {
        entry: times
        for entry, times, inside in zip(
            whole.ids.tolist(), whole.times.tolist(), whole.sampled.tolist(), strict=True
        )
        if not inside
    }
    in_sample = set(whole.ids[whole.sampled].tolist())
    assert whole.short <= 20_000 / (SMALL.most_read + 1)
    for entry, times in true.items():
        if entry not in in_sample:
            assert times - whole.short <= beside.get(entry, 0) <= times


def test_figures_of_a_sample_are_near_the_true_ones() -> None:
    limits = Limits(sample=4096, most_read=512)
    ids = skewed(200_000, 60_000, seed=3)
    # One entry takes a fifth of all, and is not in the sample.
    first = int(ids[~at_level(ids, 4)][0])
    ids = np.where(np.random.default_rng(4).random(len(ids)) < 0.2, first, ids)
    totals = ReadTotals(limits)
    for window in cut(ids, 50):
        totals.add(merged([window], limits))
    whole = totals.whole()
    exact = merged(cut(ids, 1), Limits(sample=1 << 20, most_read=1))
    assert whole.level >= 3
    assert whole.distinct == pytest.approx(exact.distinct, rel=0.06)
    true, found = distribution(exact, 60_000), distribution(whole, 60_000)
    for name, value in true.items():
        assert found[name] == pytest.approx(value, rel=0.04), name
    assert share_of_most_read(whole, 600) == pytest.approx(share_of_most_read(exact, 600), rel=0.06)
    wanted = {b["from"]: b["entries"] for b in times_read(exact)}
    for one in times_read(whole):
        if wanted[one["from"]] > 2000:
            assert one["entries"] == pytest.approx(wanted[one["from"]], rel=0.12)


def test_a_window_of_a_higher_level_takes_the_whole_with_it() -> None:
    few, many = np.arange(60), np.arange(5_000)
    totals = ReadTotals(SMALL)
    for window in [*cut(few, 1), merged(cut(many, 1), SMALL), *cut(few, 1)]:
        totals.add(window)
    true = Counter([*few.tolist(), *many.tolist(), *few.tolist()])
    whole = totals.whole()
    assert whole.level > 0
    assert totals.distinct == whole.distinct
    sampled = whole.sampled
    assert whole.times[sampled].tolist() == [true[i] for i in whole.ids[sampled].tolist()]


def test_totals_go_on_from_what_was_kept() -> None:
    windows = cut(skewed(20_000, 5_000, seed=5), 20)
    limits = Limits(sample=512, most_read=32)
    totals, again = ReadTotals(limits), ReadTotals(limits)
    for place, window in enumerate(windows):
        if place == 9:
            again = ReadTotals(limits, totals.whole())
        totals.add(window)
        if place >= 9:
            again.add(window)
    one, other = totals.whole(), again.whole()
    for name in ("ids", "times", "attended"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert (one.level, one.short) == (other.level, other.short)
