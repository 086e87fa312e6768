"""Segments: immutable Arrow IPC files of entries, written whole and read without copying.

One record batch per file, because a gather on its zero-copy numpy view is a thousand times faster
than `ChunkedArray.take` over many. Tokens are `fixed_size_list<uint16|int32>[S]`, the narrower
when the vocabulary allows it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memory_server.errors import DuplicateEntry, StoreDamaged
from memory_server.store.files import Files
from memory_server.store.names import LARGEST_ID

SEGMENT_FORMAT = "pluglm-segment-1"
COLUMNS = ("id", "doc_id", "tokens", "text", "title", "source")
HASH_BYTES = 1 << 22

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SegmentMeta:
    """What every entry of a segment has in common; it must equal its store's."""

    tokenizer_fingerprint: str
    vocab_size: int
    entry_tokens: int
    pad_token_id: int

    def __post_init__(self) -> None:
        if not self.tokenizer_fingerprint:
            raise ValueError("tokenizer_fingerprint is empty; give the tokenizer's hash")
        if self.vocab_size < 1 or self.entry_tokens < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size} and entry_tokens={self.entry_tokens} must be at "
                "least 1"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is not in the vocabulary [0, {self.vocab_size})"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentInfo:
    """What identifies a segment file: its rows, size, sha256 and the range of its ids (-1 when
    empty)."""

    rows: int
    bytes: int
    sha256: str
    min_id: int
    max_id: int


class HashingSink:
    """A file object for Arrow that hashes what passes, so that the file is not read back."""

    closed = False

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._handle.write(view)
        self.sha256.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._handle.flush()


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest stored integer that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def segment_schema(meta: SegmentMeta) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.int64()),
            ("doc_id", pa.int64()),
            (
                "tokens",
                pa.list_(pa.from_numpy_dtype(token_dtype(meta.vocab_size)), meta.entry_tokens),
            ),
            ("text", pa.large_string()),
            ("title", pa.large_string()),
            ("source", pa.large_string()),
        ],
        metadata={
            "format": SEGMENT_FORMAT,
            "tokenizer_fingerprint": meta.tokenizer_fingerprint,
            "vocab_size": str(meta.vocab_size),
            "entry_tokens": str(meta.entry_tokens),
            "pad_token_id": str(meta.pad_token_id),
        },
    )


def write_segment(
    path: Path | str,
    *,
    ids: npt.ArrayLike,
    doc_ids: npt.ArrayLike,
    tokens_NS: npt.ArrayLike,
    texts: Sequence[str],
    titles: Sequence[str],
    sources: Sequence[str],
    meta: SegmentMeta,
    files: Files | None = None,
) -> SegmentInfo:
    """Write entries as one segment file, whole or not at all.

    Args:
        path: the file to make; write into `Store.incoming` to have `Store.commit` adopt it without
            copying.
        ids: [N] integers, unique, from 0 to `names.LARGEST_ID`.
        doc_ids: [N] integers, likewise, not unique; rows of one document should follow each other.
        tokens_NS: [N, S] integers in [0, vocab_size), padded with `meta.pad_token_id`.
        texts, titles, sources: N strings each; empty where there is none.

    Raises:
        ValueError: shapes, types or ranges do not fit. DuplicateEntry: an id occurs twice.
    """
    path = Path(path)
    ids_N = entry_ids(ids, "ids")
    doc_ids_N = entry_ids(doc_ids, "doc_ids")
    rows = len(ids_N)
    for name, given in (("ids", ids_N), ("doc_ids", doc_ids_N)):
        refuse_too_large(given, name)
    tokens = _checked_tokens(np.asarray(tokens_NS), rows, meta)
    for name, column in (
        ("doc_ids", doc_ids_N),
        ("texts", texts),
        ("titles", titles),
        ("sources", sources),
    ):
        if len(column) != rows:
            raise ValueError(
                f"{name} has {len(column)} rows but ids has {rows}; they must be equal"
            )
    refuse_duplicates(ids_N, f"the entries for {path.name}")
    schema = segment_schema(meta)
    columns = [
        pa.array(ids_N),
        pa.array(doc_ids_N),
        pa.FixedSizeListArray.from_arrays(
            pa.array(tokens.reshape(-1)), type=schema.field("tokens").type
        ),
        *(pa.array(strings, type=pa.large_string()) for strings in (texts, titles, sources)),
    ]
    return write_batch(path, pa.record_batch(columns, schema=schema), files=files or Files())


def write_batch(path: Path, batch: pa.RecordBatch, *, files: Files) -> SegmentInfo:
    """Write a record batch of a segment's schema, metadata included, as a segment file."""
    digest: dict[str, Any] = {}

    def write(handle: BinaryIO) -> None:
        sink = HashingSink(handle)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sha256=sink.sha256.hexdigest(), bytes=sink.bytes)

    files.publish(path, write, bytes_needed=batch.nbytes)
    ids = batch.column("id").to_numpy(zero_copy_only=True)
    min_id, max_id = (int(ids.min()), int(ids.max())) if len(ids) else (-1, -1)
    return SegmentInfo(rows=len(ids), min_id=min_id, max_id=max_id, **digest)


class Segment:
    """One segment, memory-mapped; its arrays are read-only views of the page cache."""

    def __init__(self, path: Path | str) -> None:
        """Map the file and check its footer, schema and row count.

        Raises:
            StoreDamaged: the file is missing, truncated or not a segment.
        """
        self.path = Path(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            if reader.num_record_batches != 1:
                raise StoreDamaged(
                    f"segment {self.path} has {reader.num_record_batches} record batches instead "
                    "of 1"
                )
            batch = reader.get_batch(0)
            self.meta = _meta_of(reader.schema, self.path)
        except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
            raise StoreDamaged(
                f"segment {self.path} is missing, truncated or damaged ({error}); "
                "restore the file from a copy, or roll back to a version without it"
            ) from error
        self._batch = batch
        self.rows: int = batch.num_rows
        self.ids: Int64Array = batch.column("id").to_numpy(zero_copy_only=True)
        self.doc_ids: Int64Array = batch.column("doc_id").to_numpy(zero_copy_only=True)
        flat = batch.column("tokens").flatten().to_numpy(zero_copy_only=True)
        self.tokens: TokenArray = flat.reshape(self.rows, self.meta.entry_tokens)

    def strings(self, column: str, rows: Sequence[int]) -> list[str]:
        """The strings of `column` ("text", "title" or "source") at these rows."""
        values = self._batch.column(column)
        return [values[int(row)].as_py() for row in rows]

    def texts(self, rows: Sequence[int]) -> list[str]:
        return self.strings("text", rows)

    def taken(self, column: str, rows: Int64Array) -> pa.Array:
        """A column at these rows, copied."""
        return self._batch.column(column).take(pa.array(rows))

    def batch(self, rows: Int64Array) -> pa.RecordBatch:
        """All columns at these rows, copied, without the schema's metadata of a segment."""
        return self._batch.take(pa.array(rows)).replace_schema_metadata(None)

    @cached_property
    def info(self) -> SegmentInfo:
        """Rows, size, ids and checksum, from the whole file's bytes: as slow as reading it."""
        return SegmentInfo(
            rows=self.rows,
            bytes=self.path.stat().st_size,
            sha256=sha256_of(self.path),
            min_id=int(self.ids.min()) if self.rows else -1,
            max_id=int(self.ids.max()) if self.rows else -1,
        )


def sha256_of(path: Path) -> str:
    """The file's sha256, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_duplicates(ids_N: Int64Array, where: str) -> None:
    """Raise DuplicateEntry when an id occurs twice."""
    if len(ids_N) < 2 or bool(np.all(ids_N[1:] > ids_N[:-1])):
        return
    ordered = np.sort(ids_N)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        shown = ", ".join(str(i) for i in np.unique(repeated)[:5])
        raise DuplicateEntry(
            f"entry ids occur more than once in {where}: {shown}; every id must be unique "
            "(to replace an entry, remove the old id in the same commit)"
        )


def refuse_too_large(ids_N: Int64Array, what: str) -> None:
    """Raise ValueError when new entries would leave no numbers for those after them."""
    if len(ids_N) and ids_N.max() > LARGEST_ID:
        raise ValueError(
            f"{what} of new entries must be at most 2**63-2**37 ({LARGEST_ID}), so that there are "
            f"numbers for later ones; the largest is {ids_N.max()}"
        )


def entry_ids(values: npt.ArrayLike, name: str) -> Int64Array:
    """One row of ids, int64.

    Raises:
        ValueError: not one row of integers from 0 to 2**63 - 1.
    """
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype == object and all(isinstance(value, int) for value in array.flat):
        raise ValueError(f"{name} must fit in int64 (up to 2**63-1); one is {max(array.flat)}")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be one row of integers, not {array.dtype} {array.shape}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit in int64; the largest is {array.max()}")
    array = np.ascontiguousarray(array, dtype=np.int64)
    if len(array) and array.min() < 0:
        raise ValueError(
            f"{name} must not be negative (-1 marks a pad); the lowest is {array.min()}"
        )
    return array


def _checked_tokens(tokens: npt.NDArray[Any], rows: int, meta: SegmentMeta) -> TokenArray:
    wanted = (rows, meta.entry_tokens)
    if tokens.size == 0:
        tokens = tokens.reshape(wanted).astype(np.int64)
    if tokens.shape != wanted or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens_NS is {tokens.dtype} {tokens.shape}; integers of shape {wanted} are needed "
            "(cut or pad every entry to the store's entry_tokens)"
        )
    if tokens.size and (tokens.min() < 0 or tokens.max() >= meta.vocab_size):
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}; allowed is [0, "
            f"{meta.vocab_size}), "
            "so these are not this tokenizer's ids"
        )
    return np.ascontiguousarray(tokens, dtype=token_dtype(meta.vocab_size))


def _meta_of(schema: pa.Schema, path: Path) -> SegmentMeta:
    stored = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if stored.get("format") != SEGMENT_FORMAT or tuple(schema.names) != COLUMNS:
        raise StoreDamaged(
            f"{path} is an Arrow file but not a segment ({SEGMENT_FORMAT}, columns "
            f"{', '.join(COLUMNS)})"
        )
    try:
        return SegmentMeta(
            tokenizer_fingerprint=stored["tokenizer_fingerprint"],
            vocab_size=int(stored["vocab_size"]),
            entry_tokens=int(stored["entry_tokens"]),
            pad_token_id=int(stored["pad_token_id"]),
        )
    except ValueError as error:
        raise StoreDamaged(f"segment {path} has a damaged header: {error}") from error
