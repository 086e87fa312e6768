"""Dynamic masking for masked-language modelling, as a pure function.

A sequence's mask depends on (seed, epoch, index of the sequence) only, never on the batch, the
rank or the step, so it is the same at any world size and after a resume, and another one in the
next epoch. Of the masked tokens 80 % become the mask token, 10 % a random one and 10 % stay
(Devlin et al., arXiv 1810.04805). Salient masking prefers rare words, in the spirit of REALM's
salient spans (Guu et al., arXiv 2002.08909): names and dates are what only a memory can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data import rng
from trainer.data.vocab import VocabTables

IGNORED_LABEL = -100
_SHARE_MASKED = 0.8
_SHARE_RANDOM = 0.1

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskingSettings:
    """How to mask.

    Attributes:
        mask_probability: share of a sequence's maskable tokens to predict, in (0, 1].
        whole_word: mask all pieces of a word together.
        salient: share of the masks that is drawn with probability in proportion to rarity, in
            [0, 1]; the rest is drawn uniformly.
        vocab: tables of the tokenizer's vocabulary.
    """

    vocab: VocabTables
    mask_probability: float = 0.15
    whole_word: bool = False
    salient: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_probability <= 1.0:
            raise ValueError(f"mask_probability must be in (0, 1], got {self.mask_probability}")
        if not 0.0 <= self.salient <= 1.0:
            raise ValueError(f"salient must be in [0, 1], got {self.salient}")
        if self.salient > 0.0 and not (self.vocab.rarity > 0).any():
            raise ValueError(
                f"salient={self.salient} needs rare words, but no token of this corpus has a "
                "rarity above 0 (too little text?); use salient=0"
            )


@dataclass(frozen=True, kw_only=True)
class _Units:
    """What is masked as one: a token or a word, described at the position of its first token.

    size: int32 [B,T], number of maskable tokens, 0 where no maskable unit starts.
    weight: float32 [B,T], rarity of the unit.
    start: int64 [B,T], position at which each token's unit starts.
    """

    size: NDArray[np.int32]
    weight: NDArray[np.float32]
    start: Int64Array


def mask_batch(
    input_ids_BT: NDArray[np.integer],
    *,
    seed: int,
    epochs_B: NDArray[np.integer],
    indices_B: NDArray[np.integer],
    settings: MaskingSettings,
) -> tuple[Int64Array, Int64Array]:
    """Mask a batch of sequences.

    Every sequence with m > 0 maskable (not special) tokens gets max(1, round(p*m)) masks, halves
    rounded up. With `whole_word` words are taken in random order while they fit into this budget,
    so it may be missed by a few tokens where no remaining word fits; where no word at all fits,
    one is masked.

    Args:
        input_ids_BT: integer token ids with special tokens and padding.
        seed: masking seed.
        epochs_B: epoch that each sequence is seen in.
        indices_B: index of each sequence in its dataset.
        settings: shares and vocabulary.

    Returns:
        (masked ids int64 [B,T]; labels int64 [B,T], the true id at masked positions, else -100).

    Raises:
        ValueError: shapes do not agree, or a token id is outside the vocabulary.
    """
    vocab = settings.vocab
    _check_shapes(input_ids_BT, epochs_B, indices_B, vocab.vocab_size)
    ids = input_ids_BT.astype(np.int64)
    labels = np.full_like(ids, IGNORED_LABEL)
    if ids.size == 0:
        return ids, labels
    maskable = ~vocab.special[ids]
    units = (
        _word_units(ids, maskable, vocab)
        if settings.whole_word
        else _token_units(ids, maskable, vocab)
    )
    chosen_starts = _choose_units(units, maskable, seed, epochs_B, indices_B, settings)
    chosen = np.take_along_axis(chosen_starts, units.start, axis=1) & maskable
    rows, columns = np.nonzero(chosen)
    truth = ids[rows, columns]
    labels[rows, columns] = truth
    keys = rng.derive_key(seed, epochs_B, indices_B, rng.Purpose.MASK_REPLACE)[rows]
    action = rng.uniform(keys, columns)
    token_keys = rng.derive_key(seed, epochs_B, indices_B, rng.Purpose.MASK_TOKEN)[rows]
    regular = np.flatnonzero(~vocab.special)
    drawn = regular[(rng.uniform(token_keys, columns) * len(regular)).astype(np.int64)]
    ids[rows, columns] = np.where(
        action < _SHARE_MASKED,
        vocab.mask_token_id,
        np.where(action < _SHARE_MASKED + _SHARE_RANDOM, drawn, truth),
    )
    return ids, labels


def _check_shapes(
    input_ids_BT: NDArray[np.integer],
    epochs_B: NDArray[np.integer],
    indices_B: NDArray[np.integer],
    vocab_size: int,
) -> None:
    if input_ids_BT.ndim != 2 or not epochs_B.shape == indices_B.shape == input_ids_BT.shape[:1]:
        raise ValueError(
            f"need input ids [B,T], epochs [B] and indices [B], got {list(input_ids_BT.shape)}, "
            f"{list(epochs_B.shape)} and {list(indices_B.shape)}"
        )
    if input_ids_BT.size and not 0 <= input_ids_BT.min() <= input_ids_BT.max() < vocab_size:
        raise ValueError(
            f"token ids [{input_ids_BT.min()}, {input_ids_BT.max()}] are outside the vocabulary "
            f"[0, {vocab_size}): the sequences were made with another tokenizer or are damaged"
        )


def _token_units(ids: Int64Array, maskable: BoolArray, vocab: VocabTables) -> _Units:
    start = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return _Units(size=maskable.astype(np.int32), weight=vocab.rarity[ids], start=start)


def _word_units(ids: Int64Array, maskable: BoolArray, vocab: VocabTables) -> _Units:
    # A special token ends the word before it. Continuation pieces after it (text cut within a word)
    # form a word that is counted from the special token, which itself is never masked.
    starts = vocab.word_start[ids] | ~maskable
    starts[:, 0] = True
    flat_starts = np.flatnonzero(starts)
    size = np.zeros(ids.shape, dtype=np.int32)
    weight = np.zeros(ids.shape, dtype=np.float32)
    size.reshape(-1)[flat_starts] = np.add.reduceat(
        maskable.reshape(-1).astype(np.int32), flat_starts
    )
    weight.reshape(-1)[flat_starts] = np.maximum.reduceat(
        vocab.rarity[ids].reshape(-1), flat_starts
    )
    positions = np.where(starts, np.arange(ids.shape[1]), 0)
    return _Units(size=size, weight=weight, start=np.maximum.accumulate(positions, axis=1))


def _choose_units(
    units: _Units,
    maskable: BoolArray,
    seed: int,
    epochs_B: NDArray[np.integer],
    indices_B: NDArray[np.integer],
    settings: MaskingSettings,
) -> BoolArray:
    """Return bool [B,T], True where a chosen unit starts."""
    counter = np.arange(maskable.shape[1])

    def keys(purpose: rng.Purpose) -> rng.UInt64Array:
        return rng.derive_key(seed, epochs_B, indices_B, purpose)

    count = maskable.sum(axis=1)
    budget = np.floor(settings.mask_probability * count + 0.5).astype(np.int64)
    budget = np.minimum(np.maximum(budget, 1), count)
    chosen = np.zeros(maskable.shape, dtype=np.bool_)
    if settings.salient > 0.0:
        # The share is rounded up or down at random: with one mask per sequence a fixed rounding
        # would make every mask salient, or none.
        share = rng.uniform(keys(rng.Purpose.MASK_SHARE), 0)
        salient_budget = np.floor(settings.salient * budget + share).astype(np.int64)
        weighted = np.where(units.weight > 0, units.size, 0)
        # Sampling without replacement in proportion to weights: sort by Exp(1)/weight (Efraimidis
        # and Spirakis, 2006). The bits of positive floats are ordered as the floats are.
        exponential = -np.log(rng.uniform(keys(rng.Purpose.MASK_SALIENT)[:, None], counter))
        score = exponential / np.where(weighted > 0, units.weight, 1.0)
        chosen = _fill(score.view(np.uint64), weighted, salient_budget)[0]
        budget = budget - np.where(chosen, units.size, 0).sum(axis=1)
    order = rng.bits(keys(rng.Purpose.MASK_UNIFORM)[:, None], counter)
    rest, first = _fill(order, np.where(chosen, 0, units.size), budget)
    chosen |= rest
    if settings.whole_word:
        empty = np.flatnonzero((count > 0) & ~chosen.any(axis=1))
        chosen[empty, first[empty]] = True
    return chosen


def _fill(
    order_BT: rng.UInt64Array, size_BT: NDArray[np.int32], budget_B: Int64Array
) -> tuple[BoolArray, Int64Array]:
    """Walk each row's units in ascending order and take every one that still fits.

    Args:
        order_BT: sort keys of the units.
        size_BT: their sizes; 0 where there is none.
        budget_B: the most tokens to take.

    Returns:
        (bool [B,T], taken; int64 [B], position of the first unit in order).
    """
    tokens = order_BT.shape[1]
    low_bits = np.uint64((1 << max(1, (tokens - 1).bit_length())) - 1)
    # The position lives in the low bits: no two keys are equal, and a plain sort, several times
    # faster than argsort, carries it along. Positions without a unit go last.
    keyed = (order_BT & ~low_bits) | np.arange(tokens, dtype=np.uint64)
    np.bitwise_or(keyed, ~low_bits, out=keyed, where=size_BT == 0)
    keyed.sort(axis=1)
    position = (keyed & low_bits).astype(np.int64)
    size = np.take_along_axis(size_BT, position, axis=1)
    taken = np.zeros(size.shape, dtype=np.bool_)
    rows, open_size, remaining = np.arange(len(size)), size.copy(), budget_B[:, None]
    while True:
        # What does not fit now never will, so each pass takes the longest prefix of what fits:
        # exactly what walking one by one would take, in as many passes as there are misfits.
        open_size[open_size > remaining] = 0
        unfinished = open_size.any(axis=1)
        if not unfinished.any():
            break
        rows, open_size, remaining = rows[unfinished], open_size[unfinished], remaining[unfinished]
        total = open_size.cumsum(axis=1, dtype=np.int32)
        now = (total <= remaining) & (open_size > 0)
        taken[rows] |= now
        remaining = remaining - (open_size * now).sum(axis=1, keepdims=True)
        open_size *= ~now
    chosen = np.zeros(size.shape, dtype=np.bool_)
    np.put_along_axis(chosen, position, taken, axis=1)
    return chosen, position[:, 0]
