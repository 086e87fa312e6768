"""Token sequences on disk, memory-mapped: a folder of Arrow IPC parts read without copying.

Each part holds one record batch, because a gather on its zero-copy numpy view is a thousand times
faster than `ChunkedArray.take` over many chunks. Processes on a node share the page cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Int32Array = NDArray[np.int32]

_PATTERN = "part-*.arrow"
_TOKEN_TYPES = (pa.uint16(), pa.int32())
_SCALARS = {"doc_id": pa.int64(), "first_entry": pa.int32(), "num_entries": pa.int32()}
_WANTED = (
    "input_ids fixed_size_list<uint16 or int32>, doc_id int64, first_entry int32, num_entries int32"
)


class SequencesDamaged(ValueError):
    """A part cannot be read, or is not a part of this folder; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Gathered sequences.

    Attributes:
        input_ids: int64 [B,T] token ids, padded.
        doc_ids: int64 [B], the document that each sequence was cut from.
        first_entry: int32 [B], ordinal within the document of the first memory entry that covers
            the sequence; -1 where it is not known.
        num_entries: int32 [B], how many consecutive entries cover it.
    """

    input_ids: Int64Array
    doc_ids: Int64Array
    first_entry: Int32Array
    num_entries: Int32Array


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Read-only views of one mapped file of N rows; tokens [N,T], the rest [N]."""

    tokens: NDArray[Any]
    doc_ids: Int64Array
    first_entry: Int32Array
    num_entries: Int32Array


class SequenceDataset:
    """The sequences of one folder, in the order of its parts' names.

    Opening reads the parts' footers only. It pickles as its path: another process maps the files
    again. Reading is thread-safe.
    """

    def __init__(self, folder: Path | str) -> None:
        """Map all parts.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: it holds no parts or no sequences.
            SequencesDamaged: a part is truncated, has another schema or another length T.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no sequences at {self.folder}: the folder does not exist; build the corpus first "
                "or correct the path"
            )
        paths = sorted(self.folder.glob(_PATTERN))
        if not paths:
            raise ValueError(
                f"no sequences at {self.folder}: it holds no {_PATTERN}; build the corpus again"
            )
        self._parts = [_open_part(path) for path in paths]
        self.sequence_length: int = self._parts[0].tokens.shape[1]
        for path, part in zip(paths, self._parts, strict=True):
            if part.tokens.shape[1] != self.sequence_length:
                raise SequencesDamaged(
                    f"{path} holds sequences of {part.tokens.shape[1]} tokens but {paths[0].name} "
                    f"of {self.sequence_length}: one folder has one length; build the corpus again"
                )
        rows = [len(part.doc_ids) for part in self._parts]
        self._offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        if len(self) == 0:
            raise ValueError(
                f"the parts at {self.folder} hold no sequences; build the corpus again"
            )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __reduce__(self) -> tuple[type[SequenceDataset], tuple[Path]]:
        return (SequenceDataset, (self.folder,))

    def gather(self, indices: NDArray[np.integer]) -> SequenceBatch:
        """Read the sequences at these indices, in this order; repeats are allowed.

        Args:
            indices: integers [B] in [0, len).

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
            input_ids=np.empty((size, self.sequence_length), dtype=np.int64),
            doc_ids=np.empty(size, dtype=np.int64),
            first_entry=np.empty(size, dtype=np.int32),
            num_entries=np.empty(size, dtype=np.int32),
        )
        # side="right" steps over empty parts, whose offsets repeat.
        part_of = np.searchsorted(self._offsets, indices, side="right") - 1
        for number in np.unique(part_of):
            part = self._parts[number]
            places = np.flatnonzero(part_of == number)
            rows = indices[places] - self._offsets[number]
            batch.input_ids[places] = np.take(part.tokens, rows, axis=0)
            batch.doc_ids[places] = part.doc_ids[rows]
            batch.first_entry[places] = part.first_entry[rows]
            batch.num_entries[places] = part.num_entries[rows]
        return batch


def _open_part(path: Path) -> _Part:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise SequencesDamaged(
                f"{path} has {reader.num_record_batches} record batches instead of 1; build the "
                "corpus again"
            )
        batch = reader.get_batch(0)
        batch.validate()
    except (OSError, pa.ArrowException) as error:
        raise SequencesDamaged(
            f"{path} is truncated, damaged or not an Arrow file ({error}); build the corpus again "
            "or restore the file from a copy"
        ) from error
    _check_schema(path, batch)
    tokens = batch.column("input_ids")
    length = tokens.type.list_size
    return _Part(
        tokens=tokens.flatten().to_numpy(zero_copy_only=True).reshape(-1, length),
        doc_ids=batch.column("doc_id").to_numpy(zero_copy_only=True),
        first_entry=batch.column("first_entry").to_numpy(zero_copy_only=True),
        num_entries=batch.column("num_entries").to_numpy(zero_copy_only=True),
    )


def _check_schema(path: Path, batch: pa.RecordBatch) -> None:
    types = {field.name: field.type for field in batch.schema}
    tokens: Any = types.get("input_ids", pa.null())
    fits = (
        pa.types.is_fixed_size_list(tokens)
        and tokens.value_type in _TOKEN_TYPES
        and tokens.list_size > 0
    )
    if not fits or any(types.get(name) != wanted for name, wanted in _SCALARS.items()):
        found = ", ".join(f"{name} {type_}" for name, type_ in types.items()) or "no columns"
        raise SequencesDamaged(
            f"{path} is not a part of tokenised sequences: it has {found}, needed are {_WANTED}; "
            "build the corpus again"
        )
    nulls = [name for name in ("input_ids", *_SCALARS) if batch.column(name).null_count]
    if nulls:
        raise SequencesDamaged(f"{path} has nulls in {', '.join(nulls)}; build the corpus again")
