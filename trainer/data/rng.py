"""Counter-based random numbers: every draw is a pure function of (key, counter).

The data path draws nothing from a stateful generator, so a batch does not depend on which
rank, process or resumed run makes it. The generator is SplitMix64 (Steele et al., "Fast
splittable pseudorandom number generators", OOPSLA 2014), whose n-th output can be computed
without its predecessors; it is vectorised over keys and counters.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64Array = NDArray[np.uint64]
Float64Array = NDArray[np.float64]

_MASK_64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_ONE = np.uint64(1)
_FLOAT_SHIFT = np.uint64(12)


class Purpose(IntEnum):
    """What a stream of draws is for; part of its key, so that no two uses share numbers."""

    SHUFFLE = 1
    MASK_UNIFORM = 2
    MASK_SALIENT = 3
    MASK_SHARE = 4
    MASK_REPLACE = 5
    MASK_TOKEN = 6
    POSITIVE = 7
    PIECE = 8


def _as_uint64(values: ArrayLike | int) -> UInt64Array:
    if isinstance(values, int):
        return np.array([values & _MASK_64], dtype=np.uint64)
    return np.atleast_1d(np.asarray(values)).astype(np.uint64, copy=False)


def bits(key: UInt64Array, counter: ArrayLike | int) -> UInt64Array:
    """Draw 64 random bits for every (key, counter) pair.

    Args:
        key: uint64, at least one-dimensional.
        counter: non-negative integers that broadcast with `key`.

    Returns:
        uint64 array of the broadcast shape.
    """
    # Arrays wrap around silently on overflow, which is the arithmetic wanted here; _as_uint64
    # keeps every operand an array because numpy warns for scalars.
    state = key + (_as_uint64(counter) + _ONE) * _GOLDEN
    state ^= state >> _SHIFT_1
    state *= _MULTIPLY_1
    state ^= state >> _SHIFT_2
    state *= _MULTIPLY_2
    state ^= state >> _SHIFT_3
    return state


def derive_key(*words: ArrayLike | int) -> UInt64Array:
    """Hash integers (any Python int, or integer arrays that broadcast) into a key.

    Returns:
        uint64 array of the words' broadcast shape; shape [1] when all words are plain ints.
    """
    key = _as_uint64(0)
    for word in words:
        key = bits(key ^ _as_uint64(word), len(words))
    return key


def uniform(key: UInt64Array, counter: ArrayLike | int) -> Float64Array:
    """Draw float64 numbers in the open interval (0, 1), one for every (key, counter) pair."""
    # 52 bits and a half: neither 0 nor 1 can occur, so log(u) and log(1 - u) are finite.
    return ((bits(key, counter) >> _FLOAT_SHIFT).astype(np.float64) + 0.5) * 2.0**-52
