"""Queries as they travel: float16 with one power of two per query, so that nothing overflows.

Each query is multiplied by the power of two that brings its largest number just below 2^15, and
divided by it again on arrival. A power of two changes no digit: what is lost is float16's rounding
(a relative error of 2^-11 in numbers down to 2^-29 of the query's largest), which is the same
whatever shard, replica or path answers. Whole numbers up to 2,048 arrive as they were.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

QueryType = Literal["float16", "float32"]
QUERY_TYPES: tuple[QueryType, ...] = ("float16", "float32")

TOP_EXPONENT = 15  # float16 ends at 65,504, so rounding up to 2^15 is still finite
LARGEST_KEPT = np.float32(32752)  # the largest float16 below 2^15
FLOAT32_EXPONENT = 128
LARGEST_STEP = 126  # powers of two that float32 holds as normal numbers, up and down

Float32Array = npt.NDArray[np.float32]


def to_half(queries_BQ: Float32Array) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int16]]:
    """(scaled queries float16 [B, Q], exponents int16 [B]); NaN and infinity stay what they are."""
    largest_B = np.abs(queries_BQ).max(axis=1, initial=0.0)
    exponents_B = np.where(np.isfinite(largest_B), np.frexp(largest_B)[1], 0)
    scaled_BQ = _scaled(queries_BQ, TOP_EXPONENT - exponents_B)
    at_the_end = exponents_B == FLOAT32_EXPONENT
    if at_the_end.any():  # rounded up to 2^15 these would come back as infinity
        scaled_BQ[at_the_end] = scaled_BQ[at_the_end].clip(-LARGEST_KEPT, LARGEST_KEPT)
    return torch.from_numpy(scaled_BQ).half().numpy(), exponents_B.astype(np.int16)


def from_half(
    scaled_BQ: npt.NDArray[np.float16], exponents_B: npt.NDArray[np.int16]
) -> Float32Array:
    """The queries, float32 [B, Q]."""
    # By torch, whose conversion is vectorised: numpy's takes twenty times as long. Of a copy,
    # because what was received is read-only.
    queries_BQ: Float32Array = torch.from_numpy(scaled_BQ.copy()).float().numpy()
    return _scaled(queries_BQ, exponents_B.astype(np.int64) - TOP_EXPONENT)


def as_it_arrives(queries_BQ: Float32Array, travelling: QueryType) -> Float32Array:
    """What a shard will search for: a path without sockets must give the same answers."""
    return queries_BQ if travelling == "float32" else from_half(*to_half(queries_BQ))


def _scaled(values_BQ: Float32Array, exponents_B: npt.NDArray[Any]) -> Float32Array:
    """Values times a power of two; in two steps where a single one would exceed float32 though the
    result does not."""
    if not len(exponents_B) or np.abs(exponents_B).max() <= LARGEST_STEP:
        return values_BQ * np.ldexp(np.float32(1), exponents_B.astype(np.int32))[:, None]
    half_B = exponents_B // 2
    first_B1 = np.ldexp(np.float32(1), half_B.astype(np.int32))[:, None]
    second_B1 = np.ldexp(np.float32(1), (exponents_B - half_B).astype(np.int32))[:, None]
    scaled_BQ: Float32Array = values_BQ * first_B1 * second_B1
    return scaled_BQ
