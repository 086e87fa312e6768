"""A deterministic shuffle of [0, n) that never holds the permutation in memory.

`permute` maps any positions to the items at these positions, in O(positions) time and memory
for any n: a keyed bijection made of a generalised Feistel network (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002). An index x < a*b is split into (x // b, x % b);
each round adds to one half a hash of the other, modulo the half's own size, which is invertible
whatever the hash. a*b exceeds n by less than sqrt(n) + 1, so the few results that fall outside
[0, n) are sent through the network again ("cycle walking") at almost no cost.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trainer.data import rng

_ROUNDS = 8
_MAX_N = 2**62


def permute(
    index_array: NDArray[np.integer], *, n: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Map positions in a shuffled epoch to item indices; a bijection on [0, n).

    Args:
        index_array: integer positions in [0, n), any shape.
        n: number of items, 1 <= n <= 2**62.
        seed: shuffle seed, any integer.
        epoch: pass over the data; another epoch gives another order.

    Returns:
        int64 array of the same shape.

    Raises:
        ValueError: n or a position is out of range.
    """
    if not 1 <= n <= _MAX_N:
        raise ValueError(f"cannot shuffle n={n} items: n must be between 1 and 2**62")
    positions = np.asarray(index_array)
    if positions.size == 0:
        return np.empty(positions.shape, dtype=np.int64)
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= n:
        raise ValueError(f"positions [{low}, {high}] are outside [0, {n}), the items to shuffle")
    key = rng.derive_key(rng.Purpose.SHUFFLE, seed, epoch)
    values = _encrypt(positions.reshape(-1).astype(np.uint64), n, key)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _encrypt(values[outside], n, key)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(positions.shape)


def _encrypt(values: rng.UInt64Array, n: int, key: rng.UInt64Array) -> rng.UInt64Array:
    """One pass through the network: a bijection on [0, a*b), uint64 [X] to uint64 [X]."""
    left_size = math.isqrt(n - 1) + 1
    a, b = np.uint64(left_size), np.uint64(-(-n // left_size))
    left, right = values // b, values % b
    for round_number in range(0, _ROUNDS, 2):
        left = (left + rng.bits(rng.bits(key, round_number), right) % a) % a
        right = (right + rng.bits(rng.bits(key, round_number + 1), left) % b) % b
    return left * b + right
