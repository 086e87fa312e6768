"""Short phases see long sequences piece by piece; all of it in the end."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.data.conftest import CLS, PAD, SEP, random_sequences
from trainer.data.pieces import Phases, cut
from trainer.data.sequences import SequenceBatch

LENGTHS = [3, 8, 12, 31, 40, 2]
WIDTH, LONGEST = 40, 12


def batch_of(lengths: list[int]) -> SequenceBatch:
    size = len(lengths)
    return SequenceBatch(
        input_ids=random_sequences(lengths, WIDTH, 60_000, 1),
        doc_ids=np.arange(size, dtype=np.int64),
        first_entry=np.array([0, 4, -1, 10, 20, 7][:size], dtype=np.int32),
        num_entries=np.array([1, 2, 0, 3, 6, 0][:size], dtype=np.int32),
    )


def pieces(batch: SequenceBatch, epoch: int, longest: int = LONGEST) -> SequenceBatch:
    size = len(batch.doc_ids)
    return cut(
        batch,
        longest,
        pad_token_id=PAD,
        seed=9,
        epochs_B=np.full(size, epoch),
        indices_B=np.arange(size),
    )


def test_pieces_are_whole_short_sequences_and_cover_everything() -> None:
    batch = batch_of(LENGTHS)
    covered = [set() for _ in LENGTHS]  # type: list[set[int]]
    for epoch in range(60):
        short = pieces(batch, epoch)
        assert short.input_ids.shape == (len(LENGTHS), LONGEST)
        for row, length in enumerate(LENGTHS):
            tokens = short.input_ids[row][short.input_ids[row] != PAD]
            assert (tokens[0], tokens[-1]) == (CLS, SEP)
            if length <= LONGEST:
                assert (tokens == batch.input_ids[row, :length]).all()
                continue
            # A run of the body, no longer than it may be, and not a crumb of it.
            body = batch.input_ids[row, 1 : length - 1].tolist()
            inner = tokens[1:-1].tolist()
            start = next(i for i in range(len(body)) if body[i : i + len(inner)] == inner)
            assert (LONGEST - 2) // 2 < len(inner) <= LONGEST - 2
            covered[row] |= set(range(start, start + len(inner)))
            # Its entries are the ones at that part of the whole.
            first, count = int(short.first_entry[row]), int(short.num_entries[row])
            whole_first, whole = int(batch.first_entry[row]), int(batch.num_entries[row])
            assert whole_first <= first < first + count <= whole_first + whole
            assert (first - whole_first) * len(body) <= start * whole
            assert (first + count - whole_first) * len(body) >= (start + len(inner)) * whole
    for row in (3, 4):
        assert covered[row] == set(range(LENGTHS[row] - 2))


def test_what_is_not_known_of_entries_stays_so() -> None:
    short = pieces(batch_of(LENGTHS), 0)
    assert (short.first_entry[2], short.num_entries[2]) == (-1, 0)
    assert (short.first_entry[5], short.num_entries[5]) == (7, 0)


@pytest.mark.parametrize("longest", [0, WIDTH, WIDTH + 5])
def test_nothing_is_cut_where_nothing_is_too_long(longest: int) -> None:
    batch = batch_of(LENGTHS)
    assert pieces(batch, 0, longest) is batch


def test_phases_change_at_their_steps() -> None:
    phases = Phases((128, 256, 0), (10, 15))
    assert [phases.length(step) for step in (0, 9, 10, 14, 15, 999)] == [128, 128, 256, 256, 0, 0]
