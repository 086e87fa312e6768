"""Readers of Parquet, Arrow IPC and Hugging Face dataset directories, with pyarrow only."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.corpus.documents import Document, Fields, document_from_row
from trainer.corpus.errors import CorpusError

ROWS_PER_READ = 1024
FILE_MAGIC = b"ARROW1"
FEATHER_1_MAGIC = b"FEA1"


def read_parquet(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield one document per row, a group of rows in memory at a time."""
    with _named_errors(path), pq.ParquetFile(path) as table:
        columns = _columns(table.schema_arrow, fields, path)
        batches = table.iter_batches(batch_size=ROWS_PER_READ, columns=columns)
        yield from _documents(batches, path, source, fields)


def read_arrow(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield one document per row of an Arrow IPC file or stream (Feather 2 is the former)."""
    with _named_errors(path), pa.memory_map(str(path)) as mapped:
        magic = mapped.read(len(FILE_MAGIC))
        mapped.seek(0)
        if magic == b"":
            raise CorpusError(f"{path} is empty; write the file again")
        if magic.startswith(FEATHER_1_MAGIC):
            raise CorpusError(
                f"{path} is Feather version 1; write it again as version 2 or Parquet"
            )
        if magic == FILE_MAGIC:
            yield from _documents(_file_batches(mapped, fields, path), path, source, fields)
        else:
            yield from _documents(_stream_batches(mapped, fields, path), path, source, fields)


def dataset_files(directory: Path) -> list[Path] | None:
    """The Arrow files of a Hugging Face `save_to_disk` directory in order; None if it is not one.

    Raises:
        CorpusError: its state is damaged or a file that it names is missing.
    """
    splits = directory / "dataset_dict.json"
    if splits.is_file():
        files = []
        for split in _json_list(splits, "splits"):
            if not isinstance(split, str) or (found := dataset_files(directory / split)) is None:
                raise CorpusError(
                    f"{splits} names the split {split!r}, which is no saved dataset; "
                    "copy the whole directory, or give the splits one by one"
                )
            files += found
        return files
    state = directory / "state.json"
    if not state.is_file() or not (directory / "dataset_info.json").is_file():
        return None
    files = []
    for part in _json_list(state, "_data_files"):
        name = part.get("filename") if isinstance(part, dict) else None
        if not isinstance(name, str) or not (directory / name).is_file():
            raise CorpusError(f"{state} names the file {name!r}, which is not there; copy it too")
        files.append(directory / name)
    return files


def _json_list(path: Path, key: str) -> list[object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} is damaged ({error!r}); save the dataset again") from error
    if not isinstance(found, list):
        raise CorpusError(f"{path}: {key!r} is not a list; save the dataset again")
    return found


def _file_batches(mapped: pa.NativeFile, fields: Fields, path: Path) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(mapped)
    columns = _columns(reader.schema, fields, path)
    for number in range(reader.num_record_batches):
        yield from _slices(reader.get_batch(number).select(columns))


def _stream_batches(mapped: pa.NativeFile, fields: Fields, path: Path) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_stream(mapped)
    columns = _columns(reader.schema, fields, path)
    for batch in reader:
        yield from _slices(batch.select(columns))


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cut a memory-mapped batch, so that only a few rows at a time become Python strings."""
    for start in range(0, batch.num_rows, ROWS_PER_READ):
        yield batch.slice(start, ROWS_PER_READ)


def _columns(schema: pa.Schema, fields: Fields, path: Path) -> list[str]:
    """The columns to read: the text, and the title and the others if there are such."""
    if fields.text not in schema.names and fields.instead_of_text not in schema.names:
        raise CorpusError(
            f"{path}: there is no column {fields.text!r}; the columns are "
            f"{', '.join(schema.names) or 'none'}. Give the one that holds the text as text_field "
            "(--text-field)."
        )
    wanted = dict.fromkeys((fields.text, fields.title, *fields.others))
    return [name for name in wanted if name in schema.names]


def _documents(
    batches: Iterator[pa.RecordBatch], path: Path, source: str, fields: Fields
) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for values in batch.to_pylist():
            row += 1
            yield document_from_row(values, fields, source=source, place=f"{path}, row {row}")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into ones that name the file."""
    try:
        yield
    except CorpusError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(
            f"{path} is damaged, cut short or not of the kind its name says ({reason}); "
            "fetch or write it again"
        ) from error
