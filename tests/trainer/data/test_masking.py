"""Masks keep their budget, words stay whole, rare words come first, and all is reproducible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.masking import IGNORED_LABEL, MaskingSettings, _fill, mask_batch
from trainer.data.vocab import VocabTables

VocabMaker = Callable[..., VocabTables]
SequenceMaker = Callable[..., np.ndarray]
CONTINUATIONS = range(30, 50)


def run(
    ids: np.ndarray, settings: MaskingSettings, *, seed: int = 3, epoch: int = 0, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rows = len(ids)
    return mask_batch(
        ids,
        seed=seed,
        epochs_B=np.full(rows, epoch),
        indices_B=np.arange(first, first + rows),
        settings=settings,
    )


def words_of(ids: np.ndarray) -> list[list[int]]:
    """The positions of each word of one sequence, found one token at a time."""
    words: list[list[int]] = []
    open_word = False
    for position, token in enumerate(ids):
        if token < 5:
            open_word = False
        elif token in CONTINUATIONS and open_word:
            words[-1].append(position)
        else:
            words.append([position])
            open_word = True
    return words


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=8)
PROBABILITIES = st.floats(0.01, 1.0)


@given(
    lengths=LENGTHS,
    probability=PROBABILITIES,
    salient=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**40),
)
def test_every_sequence_gets_its_exact_budget(
    vocab_maker: VocabMaker,
    sequence_maker: SequenceMaker,
    lengths: list[int],
    probability: float,
    salient: float,
    seed: int,
) -> None:
    ids = sequence_maker(lengths, 40, 50, seed)
    vocab = vocab_maker(rarity=np.linspace(0, 1, 50))
    settings = MaskingSettings(vocab=vocab, mask_probability=probability, salient=salient)
    masked, labels = run(ids, settings, seed=seed)
    chosen = labels != IGNORED_LABEL
    for row in range(len(ids)):
        maskable = int((ids[row] >= 5).sum())
        wanted = max(1, int(probability * maskable + 0.5)) if maskable else 0
        assert chosen[row].sum() == wanted
    assert (ids[chosen] >= 5).all()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    assert masked.dtype == labels.dtype == np.int64


@given(
    lengths=LENGTHS,
    probability=PROBABILITIES,
    salient=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**40),
)
def test_words_are_masked_whole_within_the_budget(
    vocab_maker: VocabMaker,
    sequence_maker: SequenceMaker,
    lengths: list[int],
    probability: float,
    salient: float,
    seed: int,
) -> None:
    ids = sequence_maker(lengths, 40, 50, seed)
    vocab = vocab_maker(continuations=CONTINUATIONS, rarity=np.linspace(0, 1, 50))
    settings = MaskingSettings(
        vocab=vocab, mask_probability=probability, salient=salient, whole_word=True
    )
    labels = run(ids, settings, seed=seed)[1]
    for row in range(len(ids)):
        words = words_of(ids[row])
        chosen = set(np.flatnonzero(labels[row] != IGNORED_LABEL).tolist())
        masked_words = [word for word in words if chosen & set(word)]
        assert chosen == {position for word in masked_words for position in word}
        maskable = sum(map(len, words))
        if not maskable:
            continue
        budget = max(1, int(probability * maskable + 0.5))
        smallest = min(map(len, words))
        if smallest > budget:
            assert len(masked_words) == 1
        else:
            assert 1 <= len(chosen) <= budget
            # What was left of the budget was too little for every word that was left.
            assert all(len(w) > budget - len(chosen) for w in words if w not in masked_words)


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    budget=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_filling_equals_walking_one_by_one(sizes: list[int], budget: int, seed: int) -> None:
    order = np.random.default_rng(seed).integers(0, 2**63, (1, len(sizes))).astype(np.uint64)
    chosen, first = _fill(order, np.array([sizes], dtype=np.int32), np.array([budget]))
    wanted, left = set(), budget
    # The lowest bits of a key give way to the position, so they do not count in the order.
    width = max(1, (len(sizes) - 1).bit_length())
    walk = sorted(range(len(sizes)), key=lambda i: (int(order[0, i]) >> width, i))
    for unit in walk:
        if 0 < sizes[unit] <= left:
            wanted.add(unit)
            left -= sizes[unit]
    assert set(np.flatnonzero(chosen[0]).tolist()) == wanted
    if any(sizes):
        assert first[0] == next(unit for unit in walk if sizes[unit])


def test_a_word_cut_by_the_sequence_start_stands_alone(vocab_maker: VocabMaker) -> None:
    vocab = vocab_maker(continuations=CONTINUATIONS)
    settings = MaskingSettings(vocab=vocab, whole_word=True, mask_probability=0.01)
    ids = np.tile([2, 30, 31, 7, 32, 1, 33, 3, 0, 0], (400, 1))
    chosen = run(ids, settings)[1] != IGNORED_LABEL
    assert {tuple(np.flatnonzero(row)) for row in chosen} == {(6,)}
    settings = MaskingSettings(vocab=vocab, whole_word=True, mask_probability=0.4)
    found = {tuple(np.flatnonzero(row)) for row in run(ids, settings)[1] != IGNORED_LABEL}
    assert found == {(1, 2), (3, 4), (6,)}


def test_a_row_that_begins_within_a_word_does_not_join_the_row_before(
    vocab_maker: VocabMaker,
) -> None:
    vocab = vocab_maker(continuations=CONTINUATIONS)
    settings = MaskingSettings(vocab=vocab, whole_word=True, mask_probability=0.5)
    ids = np.tile([30, 31, 7, 32], (100, 1))
    found = {tuple(np.flatnonzero(row)) for row in run(ids, settings)[1] != IGNORED_LABEL}
    assert found == {(0, 1), (2, 3)}


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("salient", [0.0, 0.5])
def test_a_mask_depends_on_seed_epoch_and_sequence_only(
    vocab_maker: VocabMaker, sequence_maker: SequenceMaker, whole_word: bool, salient: float
) -> None:
    vocab = vocab_maker(continuations=CONTINUATIONS, rarity=np.linspace(0, 1, 50))
    settings = MaskingSettings(vocab=vocab, whole_word=whole_word, salient=salient)
    ids = sequence_maker([40] * 12, 40, 50, 0)
    masked, labels = run(ids, settings, first=100)
    order = np.random.default_rng(0).permutation(12)
    again = mask_batch(
        ids[order], seed=3, epochs_B=np.zeros(12, int), indices_B=100 + order, settings=settings
    )
    np.testing.assert_array_equal(again[0], masked[order])
    np.testing.assert_array_equal(again[1], labels[order])
    for other in (run(ids, settings, first=100, epoch=1), run(ids, settings, first=100, seed=4)):
        assert (other[1] != labels).any(axis=1).sum() >= 11


def test_a_token_is_masked_hidden_or_kept_in_the_right_shares(
    vocab_maker: VocabMaker, sequence_maker: SequenceMaker
) -> None:
    ids = sequence_maker([100] * 1000, 100, 5000, 0)
    masked, labels = run(ids, MaskingSettings(vocab=vocab_maker(5000)))
    chosen = labels != IGNORED_LABEL
    total = chosen.sum()
    hidden = masked[chosen] == 4
    kept = masked[chosen] == labels[chosen]
    assert abs(hidden.mean() - 0.8) < 5 * np.sqrt(0.16 / total)
    assert abs(kept.mean() - 0.1) < 5 * np.sqrt(0.09 / total)
    drawn = masked[chosen][~hidden & ~kept]
    assert drawn.min() >= 5
    # Uniform over the whole vocabulary: each quarter gets its share.
    shares = np.histogram(drawn, bins=4, range=(5, 5000))[0] / len(drawn)
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.19 / len(drawn))


def test_uniform_masks_are_uniform_over_positions(
    vocab_maker: VocabMaker, sequence_maker: SequenceMaker
) -> None:
    ids = sequence_maker([34] * 4000, 34, 50, 0)
    share = (run(ids, MaskingSettings(vocab=vocab_maker()))[1] != IGNORED_LABEL).mean(axis=0)
    assert share[0] == share[-1] == 0
    expected = 5 / 32
    assert np.abs(share[1:-1] - expected).max() < 5 * np.sqrt(expected / 4000)


def test_salient_masks_follow_the_rarity_and_the_rest_is_uniform(vocab_maker: VocabMaker) -> None:
    rarity = np.zeros(50)
    rarity[[10, 11]] = [1.0, 3.0]
    ids = np.tile([2, 10, 11, 12, 13, 14, 15, 16, 17, 3], (20_000, 1))
    vocab = vocab_maker(rarity=rarity)

    def share(salient: float) -> np.ndarray:
        settings = MaskingSettings(vocab=vocab, mask_probability=0.1, salient=salient)
        return np.asarray((run(ids, settings)[1] != IGNORED_LABEL).mean(axis=0)[1:-1])

    # One mask per sequence: 1 : 3 among the rare, nothing else.
    assert np.abs(share(1.0) - [0.25, 0.75, 0, 0, 0, 0, 0, 0]).max() < 0.02
    wanted = 0.6 * np.array([0.25, 0.75, 0, 0, 0, 0, 0, 0]) + 0.4 / 8
    assert np.abs(share(0.6) - wanted).max() < 0.02
    assert np.abs(share(0.0) - 1 / 8).max() < 0.02


def test_a_sequence_without_rare_words_still_gets_its_budget(vocab_maker: VocabMaker) -> None:
    rarity = np.zeros(50)
    rarity[49] = 1.0
    ids = np.tile(np.arange(5, 25), (8, 1))
    settings = MaskingSettings(vocab=vocab_maker(rarity=rarity), salient=1.0)
    assert ((run(ids, settings)[1] != IGNORED_LABEL).sum(axis=1) == 3).all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_sequence_without_words_gets_no_mask(vocab_maker: VocabMaker, whole_word: bool) -> None:
    settings = MaskingSettings(vocab=vocab_maker(), whole_word=whole_word)
    ids = np.array([[2, 3, 0, 0], [2, 9, 3, 0], [0, 0, 0, 0]])
    masks = (run(ids, settings)[1] != IGNORED_LABEL).sum(axis=1)
    np.testing.assert_array_equal(masks, [0, 1, 0])


def test_the_input_is_left_alone_and_may_be_empty(vocab_maker: VocabMaker) -> None:
    settings = MaskingSettings(vocab=vocab_maker(), mask_probability=1.0)
    ids = np.array([[2, 9, 10, 3]])
    run(ids, settings)
    np.testing.assert_array_equal(ids, [[2, 9, 10, 3]])
    assert run(np.empty((0, 4), dtype=np.int64), settings)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_probability": 0.0}, r"mask_probability must be in \(0, 1\], got 0.0"),
        ({"mask_probability": 1.5}, "mask_probability"),
        ({"salient": -0.1}, r"salient must be in \[0, 1\]"),
        ({"salient": 0.5}, "no token of this corpus has a rarity"),
    ],
)
def test_impossible_settings_are_refused(
    vocab_maker: VocabMaker, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaskingSettings(vocab=vocab_maker(), **change)


def test_tokens_of_another_vocabulary_are_refused(vocab_maker: VocabMaker) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        run(np.array([[2, 50, 3]]), MaskingSettings(vocab=vocab_maker(50)))


def test_shapes_that_do_not_agree_are_refused(vocab_maker: VocabMaker) -> None:
    with pytest.raises(ValueError, match=r"need input ids \[B,T\]"):
        mask_batch(
            np.zeros((2, 4), dtype=np.int64),
            seed=0,
            epochs_B=np.zeros(2, dtype=np.int64),
            indices_B=np.zeros(3, dtype=np.int64),
            settings=MaskingSettings(vocab=vocab_maker()),
        )
