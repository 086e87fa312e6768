"""Several sequence datasets as one, numbered one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.sequences import SequenceBatch, SequenceDataset


class JoinedSequences:
    """Datasets of one tokenizer; shorter sequences are padded to the longest length T."""

    def __init__(self, datasets: Sequence[SequenceDataset], *, pad_token_id: int) -> None:
        self.datasets = tuple(datasets)
        self.sequence_length = max(dataset.sequence_length for dataset in self.datasets)
        self._pad = pad_token_id
        self._offsets = np.concatenate(
            [[0], np.cumsum([len(dataset) for dataset in self.datasets], dtype=np.int64)]
        )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def gather(self, indices: NDArray[np.integer]) -> SequenceBatch:
        """Read sequences in this order; see `SequenceDataset.gather`.

        Raises:
            IndexError: an index is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"sequence indices [{indices.min()}, {indices.max()}] are outside [0, {len(self)})"
            )
        size = len(indices)
        batch = SequenceBatch(
            input_ids=np.full((size, self.sequence_length), self._pad, dtype=np.int64),
            doc_ids=np.empty(size, dtype=np.int64),
            first_entry=np.empty(size, dtype=np.int32),
            num_entries=np.empty(size, dtype=np.int32),
        )
        which = np.searchsorted(self._offsets, indices, side="right") - 1
        for number in np.unique(which):
            places = np.flatnonzero(which == number)
            part = self.datasets[number].gather(indices[places] - self._offsets[number])
            batch.input_ids[places, : part.input_ids.shape[1]] = part.input_ids
            batch.doc_ids[places] = part.doc_ids
            batch.first_entry[places] = part.first_entry
            batch.num_entries[places] = part.num_entries
        return batch
