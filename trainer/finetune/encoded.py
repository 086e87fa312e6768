"""Tokenised rows as torch wants them, over Arrow memory, and batches padded to their longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

TOKENIZE_ROWS = 512
IGNORED = -100
OWN_DOC_IDS = "own_doc_ids"
"""The column of a training row's own document, whose entries it must not find."""
RIGHT_ENTRIES = "right_entries"
"""The column of a training row's right entry: token ids as a memory holds them."""


class EncodedRows(Dataset[dict[str, Any]]):
    """Sequences of token ids and what is to be predicted of them, in the file's order.

    Columns are Arrow arrays, whose memory worker processes share: one list of int32 per row
    (`input_ids`, `token_type_ids`, token-wise `labels`), or one number per row.
    """

    def __init__(
        self,
        columns: Mapping[str, pa.Array],
        *,
        cut: int,
        kept: Sequence[str] = (),
        words_left_out: int = 0,
    ) -> None:
        """Hold the columns.

        Args:
            columns: name to values.
            cut: how many rows of the file lost text to the length limit.
            kept: columns that are no input of the model: what its answers are read with.
            words_left_out: words with a tag, but without a token to learn or read it at.
        """
        self.cut = cut
        self._arrays, self._kept = columns, tuple(kept)
        self.words_left_out = words_left_out
        self._columns = {name: _values(array) for name, array in columns.items()}
        self._inputs = [name for name in columns if name not in kept]
        self.lengths: list[int] = np.diff(self._columns["input_ids"][0]).tolist()

    def with_column(self, name: str, array: pa.Array) -> EncodedRows:
        """The same rows with one more column, which batches carry."""
        return EncodedRows(
            {**self._arrays, name: array},
            cut=self.cut,
            kept=self._kept,
            words_left_out=self.words_left_out,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.kept(name, row) for name in self._inputs}

    def kept(self, name: str, row: int) -> Any:
        """One value of a column: an int32 array [T], or a number."""
        offsets, values = self._columns[name]
        return values[row] if offsets is None else values[offsets[row] : offsets[row + 1]]


def _values(array: pa.Array) -> tuple[Any, Any]:
    """Views of an array: offsets and values of its lists, or None and its numbers."""
    if not pa.types.is_list(array.type):
        return None, array.to_numpy(zero_copy_only=True)
    offsets = array.offsets.to_numpy(zero_copy_only=True)
    return offsets, array.values.to_numpy(zero_copy_only=True)


def int_lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    """Lists of whole numbers as an Arrow array of int32 lists."""
    return pa.array(rows, pa.list_(pa.int32()))


@dataclass(frozen=True, kw_only=True)
class PaddedBatches:
    """Rows to a batch: sequences are padded to the longest of them, and the mask says where."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make `input_ids` and `attention_mask` int64 [B,T], and the other columns.

        Token types are padded with 0, token-wise labels with -100; numbers become [B], int64 or
        float32. Right entries have a length of their own, int64 [B,S].
        """
        mask_BT = _mask(rows, "input_ids")
        batch = {"attention_mask": mask_BT.to(torch.int64)}
        pad = self.pad_token_id
        fill = {"input_ids": pad, "token_type_ids": 0, RIGHT_ENTRIES: pad}
        for name, first in rows[0].items():
            if isinstance(first, np.ndarray):
                there_BT = _mask(rows, name) if name == RIGHT_ENTRIES else mask_BT
                padded_BT = torch.full(there_BT.shape, fill.get(name, IGNORED))
                padded_BT[there_BT] = torch.from_numpy(
                    np.concatenate([row[name] for row in rows]).astype(np.int64)
                )
                batch[name] = padded_BT
            else:
                kind = torch.float32 if isinstance(first, np.floating) else torch.int64
                batch[name] = torch.tensor([row[name].item() for row in rows], dtype=kind)
        return batch


def _mask(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """Where the rows of a column have values when they are padded to the longest, bool [B,T]."""
    lengths = torch.tensor([len(row[name]) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]
