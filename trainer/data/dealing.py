"""How one optimizer step's sequences are dealt to ranks and micro-batches.

What a step consists of never depends on the number of ranks; only who computes what does. The
model leaves padding out of everything but attention, so that sequences of one length side by side
save attention's part, and steps of as many tokens as another take as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


def within_tokens(lengths_B: Int64Array, most_tokens: int) -> int:
    """How many of the next sequences a step takes: at most so many tokens, at least one sequence.

    Args:
        lengths_B: tokens of each, special ones included and padding not.
        most_tokens: the budget; 0: none, all are taken.
    """
    if not most_tokens:
        return len(lengths_B)
    fitting = int(np.searchsorted(np.cumsum(lengths_B), most_tokens, side="right"))
    return max(1, fitting)


def deal(
    lengths_B: Int64Array, *, ranks: int, passes: int, by_length: bool, by_tokens: bool
) -> list[list[Int64Array]]:
    """Deal sequences; every one goes to exactly one micro-batch.

    Args:
        lengths_B: tokens of each.
        ranks, passes: trainers, and micro-batches of each.
        by_length: sequences of like length go together, and all ranks compute like lengths at the
            same time, so that none waits; otherwise they stay as they come.
        by_tokens: micro-batches hold about as many tokens as another, not as many sequences.

    Returns:
        For each rank, for each of its micro-batches, int64 places in [0, B); none is empty.

    Raises:
        ValueError: there are fewer sequences than micro-batches.
    """
    groups = ranks * passes
    if len(lengths_B) < groups:
        raise ValueError(
            f"a step of {len(lengths_B)} sequences cannot be dealt to {ranks} trainers x {passes} "
            "passes; raise optim.batch_tokens or runtime.micro_batch_size, or use fewer trainers"
        )
    places = np.arange(len(lengths_B), dtype=np.int64)
    if by_length:
        places = np.argsort(lengths_B, kind="stable")
    if by_tokens:
        cuts = _token_cuts(lengths_B[places], groups)
    else:
        cuts = np.arange(1, groups) * len(places) // groups
    parts = np.split(places, cuts)
    if by_length:
        return [parts[rank::ranks] for rank in range(ranks)]
    return [parts[rank * passes : (rank + 1) * passes] for rank in range(ranks)]


def _token_cuts(lengths_B: Int64Array, groups: int) -> Int64Array:
    """Where to cut so that each group holds about as many tokens, and none is empty."""
    ends = np.cumsum(lengths_B)
    shares = ends[-1] * np.arange(1, groups) / groups
    numbers = np.arange(1, groups)
    cuts = np.searchsorted(ends, shares, side="left") + 1
    # At least one sequence each: no cut before, and room for those behind.
    cuts = np.maximum.accumulate(np.maximum(cuts, numbers) - numbers) + numbers
    return np.asarray(np.minimum(cuts, len(lengths_B) - groups + numbers), dtype=np.int64)
