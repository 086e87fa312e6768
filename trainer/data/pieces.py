"""Long sequences cut short for a while: the first phase of a run learns from short ones.

Attention costs the square of the length, so most of BERT's steps are taken on short sequences and
only the last ones on long ones (Devlin et al., arXiv 1810.04805, appendix A.2). One corpus serves
both: in a phase of length L each sequence is seen once per epoch as one piece of at most L tokens,
in another epoch as another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data import rng
from trainer.data.sequences import SequenceBatch

_EDGES = 2  # [CLS] and [SEP]


@dataclass(frozen=True)
class Phases:
    """Which length holds at which step.

    Attributes:
        lengths: most tokens of a sequence, phase by phase; 0: as long as they are.
        steps: the step at which each further phase begins; one fewer than lengths.
    """

    lengths: Sequence[int] = (0,)
    steps: Sequence[int] = ()

    def length(self, step: int) -> int:
        """Most tokens of a sequence in the step after `step` steps."""
        return self.lengths[int(np.searchsorted(self.steps, step, side="right"))]


ALWAYS_WHOLE = Phases()


def cut(
    batch: SequenceBatch,
    longest: int,
    *,
    pad_token_id: int,
    seed: int,
    epochs_B: NDArray[np.integer],
    indices_B: NDArray[np.integer],
) -> SequenceBatch:
    """Cut sequences that are longer than so many tokens to one of their pieces.

    Pieces of a sequence are of even length, and each keeps the first and the last token, which are
    [CLS] and [SEP]. The entries that cover a piece are taken in proportion to its place. Which
    piece it is depends on (seed, epoch, index of the sequence) only.

    Args:
        batch: padded at the end.
        longest: tokens with [CLS] and [SEP], at least 3; 0: nothing is cut.

    Returns:
        As many sequences, input_ids int64 [B, min(T, longest)].
    """
    width = batch.input_ids.shape[1]
    if not longest or longest >= width:
        return batch
    present = (batch.input_ids != pad_token_id).sum(1)
    body = np.maximum(present - _EDGES, 0)
    pieces = np.maximum(-(-body // (longest - _EDGES)), 1)
    key = rng.derive_key(seed, epochs_B, indices_B, rng.Purpose.PIECE)
    piece = (rng.uniform(key, 0) * pieces).astype(np.int64)
    begin, end = piece * body // pieces, (piece + 1) * body // pieces
    places = np.arange(longest)[None, :]
    # Where each token comes from: [CLS], the piece, then [SEP] directly behind it.
    taken = end - begin
    source = begin[:, None] + places
    source[:, 0] = 0
    source = np.where(places == (taken + 1)[:, None], (present - 1)[:, None], source)
    kept = places < np.minimum(taken + _EDGES, present)[:, None]
    ids = np.take_along_axis(batch.input_ids, np.clip(source, 0, width - 1), axis=1)
    entries = batch.num_entries.astype(np.int64)
    whole = np.maximum(body, 1)
    first = begin * entries // whole
    last = np.maximum(-(-end * entries // whole), first)
    known = (batch.first_entry >= 0) & (entries > 0) & (body > 0)
    return SequenceBatch(
        input_ids=np.where(kept, ids, pad_token_id),
        doc_ids=batch.doc_ids,
        first_entry=np.where(known, batch.first_entry + first, batch.first_entry).astype(np.int32),
        num_entries=np.where(known, last - first, entries).astype(np.int32),
    )
