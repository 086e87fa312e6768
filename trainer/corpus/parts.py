"""Arrow files of token rows, one record batch each, written whole and mapped without copying."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.corpus.errors import CorpusError

Int64Array = NDArray[np.int64]
TokenArray = NDArray[Any]

SEQUENCE_COLUMNS = ("input_ids", "doc_id", "first_entry", "num_entries")


def write_batch(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write one record batch as an Arrow IPC file and sync it; the caller renames it into place."""
    batch = pa.record_batch(dict(columns))
    with path.open("wb") as handle:
        with pa.ipc.new_file(handle, batch.schema) as writer:
            writer.write_batch(batch)
        handle.flush()
        os.fsync(handle.fileno())


def read_batch(path: Path) -> pa.RecordBatch:
    """Map a file of one record batch.

    Raises:
        CorpusError: it is missing, cut short or of another kind.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise CorpusError(f"{path} has {reader.num_record_batches} record batches instead of 1")
        return reader.get_batch(0)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{path} is missing or damaged ({error}); build the corpus again with overwrite "
            "(--overwrite)"
        ) from error


def token_column(tokens: TokenArray) -> pa.FixedSizeListArray:
    """[N, T] integers to a fixed_size_list column of their own type."""
    rows, length = tokens.shape
    flat = pa.array(np.ascontiguousarray(tokens).reshape(rows * length))
    return pa.FixedSizeListArray.from_arrays(flat, length)


def token_rows(batch: pa.RecordBatch, name: str) -> TokenArray:
    """A fixed_size_list column to a read-only [N, T] view."""
    column = batch.column(name)
    flat = column.flatten().to_numpy(zero_copy_only=True)
    rows: TokenArray = flat.reshape(-1, column.type.list_size)
    return rows


def sequence_columns(
    tokens: TokenArray, doc_ids: Int64Array, first: Int64Array, count: Int64Array
) -> dict[str, pa.Array]:
    """The columns of a file of training sequences."""
    values = (
        token_column(tokens),
        pa.array(doc_ids, type=pa.int64()),
        pa.array(first.astype(np.int32)),
        pa.array(count.astype(np.int32)),
    )
    return dict(zip(SEQUENCE_COLUMNS, values, strict=True))
