"""Who computes what of a step: everything once, nothing empty, even loads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dealing import deal, within_tokens


@given(
    lengths=st.lists(st.integers(1, 512), min_size=8, max_size=60),
    ranks=st.sampled_from([1, 2, 4]),
    passes=st.sampled_from([1, 2]),
    by_length=st.booleans(),
    by_tokens=st.booleans(),
)
def test_every_sequence_goes_to_one_micro_batch(
    lengths: list[int], ranks: int, passes: int, by_length: bool, by_tokens: bool
) -> None:
    dealt = deal(
        np.array(lengths), ranks=ranks, passes=passes, by_length=by_length, by_tokens=by_tokens
    )
    assert [len(rank) for rank in dealt] == [passes] * ranks
    parts = [part for rank in dealt for part in rank]
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    if not by_tokens:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    if by_length:
        # Whatever is computed at a time is no longer than what is computed after it.
        spans = [[lengths[i] for rank in dealt for i in rank[p]] for p in range(passes)]
        assert all(max(a) <= min(b) for a, b in itertools.pairwise(spans))


def test_micro_batches_hold_about_as_many_tokens() -> None:
    lengths = np.random.default_rng(0).integers(8, 129, 512)
    dealt = deal(lengths, ranks=2, passes=4, by_length=True, by_tokens=True)
    loads = [lengths[part].sum() for rank in dealt for part in rank]
    assert max(loads) - min(loads) <= 2 * 128
    sizes = [len(part) for part in dealt[0]]
    assert sizes[0] > 2 * sizes[-1]  # many short ones, few long ones


def test_a_step_ends_at_its_budget() -> None:
    lengths = np.array([5, 5, 10, 3, 30])
    assert within_tokens(lengths, 0) == 5
    assert within_tokens(lengths, 20) == 3
    assert within_tokens(lengths, 22) == 3
    assert within_tokens(lengths, 23) == 4
    assert within_tokens(lengths, 1000) == 5
    assert within_tokens(lengths, 2) == 1


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="3 sequences cannot be dealt to 2 trainers x 2 passes"):
        deal(np.array([1, 2, 3]), ranks=2, passes=2, by_length=False, by_tokens=True)
