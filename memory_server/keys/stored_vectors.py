"""Keys and values of entries, made once and kept: for a memory that is never encoded again.

    VECTORS/vectors.arrow    one record batch: id, key, values, mark; memory-mapped, never copied
    VECTORS/vectors.json     its size and checksum, written last: without it nothing counts

The numbers are kept as they were given, float16 or float32, bit for bit. A mark is made of an
entry's tokens, so that an entry whose text was replaced under the same id is noticed.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from memory_server.errors import StoreDamaged, StoreError, StoreNotFound, UnknownEntry
from memory_server.store.files import Files
from memory_server.store.segments import HashingSink, Int64Array, refuse_duplicates, sha256_of

VECTORS_FORMAT = "pluglm-vectors-1"
ARROW, ABOUT = "vectors.arrow", "vectors.json"
CHECK_ROWS = 1 << 14
FloatArray = npt.NDArray[Any]


class StoredVectors:
    """Opened vectors. Make them with `StoredVectors.write`, read them with `StoredVectors.open`.

    Attributes:
        ids_N: int64.
        keys_NQ: float16 or float32, a read-only view of the file.
        values_NJH: likewise, or None: J vectors per entry.
    """

    def __init__(self, path: Path, batch: pa.RecordBatch, about: dict[str, Any]) -> None:
        self.path = path
        self._about = about
        metadata = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
        self.ids_N: Int64Array = batch.column("id").to_numpy(zero_copy_only=True)
        self.keys_NQ: FloatArray = _matrix(batch, "key")
        self.values_NJH: FloatArray | None = None
        if "values" in batch.schema.names:
            per_entry = int(metadata["vectors_per_entry"])
            self.values_NJH = _matrix(batch, "values").reshape(len(self.ids_N), per_entry, -1)
        self._marks_N: Int64Array | None = None
        if "mark" in batch.schema.names:
            self._marks_N = batch.column("mark").to_numpy(zero_copy_only=True)
        self._order_N: Int64Array | None = None
        if not bool(np.all(self.ids_N == np.arange(len(self.ids_N)))):
            self._order_N = np.argsort(self.ids_N, kind="stable")

    @classmethod
    def write(
        cls,
        path: Path | str,
        ids: npt.ArrayLike,
        keys_NQ: FloatArray,
        values_NJH: FloatArray | None = None,
        *,
        tokens_NS: npt.NDArray[Any] | None = None,
        files: Files | None = None,
    ) -> Self:
        """Write vectors to a new directory, whole or not at all, without copying the arrays.

        Args:
            path: the directory to make.
            ids: [N] integers, unique, not negative.
            keys_NQ: float16 or float32, finite, C order; a memory-mapped array stays on disk.
            values_NJH: likewise; J vectors per entry.
            tokens_NS: the entries' tokens; given, an entry that later has other tokens is refused.

        Raises:
            ValueError: shapes, types or numbers do not fit; names the array.
            DuplicateEntry: an id occurs twice. StoreError: there are vectors already.
        """
        path, files = Path(path), files or Files()
        if (path / ABOUT).exists():
            raise StoreError(f"{path} holds vectors already; choose another path, or remove it")
        ids_N = np.ascontiguousarray(ids, dtype=np.int64)
        if ids_N.ndim != 1 or (len(ids_N) and ids_N.min() < 0):
            raise ValueError(f"ids must be one row of integers from 0 upwards, not {ids_N.shape}")
        refuse_duplicates(ids_N, f"the vectors for {path}")
        check_vectors("keys_NQ", keys_NQ, rows=len(ids_N), axes=2)
        columns: dict[str, pa.Array] = {"id": pa.array(ids_N), "key": _lists(keys_NQ)}
        metadata = {"format": VECTORS_FORMAT}
        if values_NJH is not None:
            check_vectors("values_NJH", values_NJH, rows=len(ids_N), axes=3)
            columns["values"] = _lists(values_NJH.reshape(len(ids_N), _product(values_NJH)))
            metadata["vectors_per_entry"] = str(values_NJH.shape[1])
        if tokens_NS is not None:
            if len(tokens_NS) != len(ids_N):
                raise ValueError(f"tokens_NS has {len(tokens_NS)} rows, but ids has {len(ids_N)}")
            columns["mark"] = pa.array(token_marks(tokens_NS))
        schema = pa.schema(
            [(name, column.type) for name, column in columns.items()], metadata=metadata
        )
        batch = pa.record_batch(list(columns.values()), schema=schema)
        about: dict[str, Any] = {"format": VECTORS_FORMAT, "rows": len(ids_N)}

        def write(handle: BinaryIO) -> None:
            sink = HashingSink(handle)
            options = pa.ipc.IpcWriteOptions(allow_64bit=True)  # rows times width outgrow 31 bits
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema, options=options) as writer:
                writer.write_batch(batch)
            about.update(sha256=sink.sha256.hexdigest(), bytes=sink.bytes)

        files.make_directory(path)
        files.publish(path / ARROW, write)
        files.publish_bytes(path / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map vectors after the checks that cost nothing: size, footer, row count.

        Raises:
            StoreNotFound: there are none. StoreDamaged: names the damaged file.
        """
        path = Path(path)
        try:
            about = json.loads((path / ABOUT).read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFound(
                f"no stored vectors at {path} ({ABOUT} is missing); make them with `pluglm convert "
                "published` or freeze_vectors"
            ) from error
        except ValueError as error:
            raise StoreDamaged(f"{path / ABOUT} is damaged: {error}") from error
        file = path / ARROW
        try:
            if about["format"] != VECTORS_FORMAT or file.stat().st_size != about["bytes"]:
                raise StoreDamaged(
                    f"{file} has {file.stat().st_size} bytes, or is no {VECTORS_FORMAT} file of "
                    f"{about['bytes']} bytes as {ABOUT} says; make the vectors again"
                )
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batch = reader.get_batch(0)
            if reader.num_record_batches != 1 or batch.num_rows != about["rows"]:
                raise StoreDamaged(f"{file} has not the {about['rows']} rows that {ABOUT} names")
            return cls(path, batch, about)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{file} is missing, truncated or damaged ({error}); make the vectors again"
            ) from error

    @property
    def key_width(self) -> int:
        """Q."""
        return int(self.keys_NQ.shape[1])

    def verify(self) -> None:
        """Compare every byte with its checksum: as slow as reading it. Raises StoreDamaged."""
        if sha256_of(self.path / ARROW) != self._about["sha256"]:
            raise StoreDamaged(f"{self.path / ARROW} was altered; make the vectors again")

    def keys(self, ids: Tensor) -> Tensor:
        """float32 [..., Q] for int64 ids [...]; zeros for -1. Raises UnknownEntry."""
        return self._gather(self.keys_NQ, ids)

    def values(self, ids: Tensor) -> Tensor | None:
        """float32 [..., J, H] for int64 ids [...]; zeros for -1; None when none are stored.

        Raises:
            UnknownEntry: names an id that has no vector.
        """
        return None if self.values_NJH is None else self._gather(self.values_NJH, ids)

    def keys_of(self, ids: Int64Array, tokens: npt.NDArray[Any]) -> Tensor:
        """The keys of whole entries, float32 [n, Q]: how a memory takes them (`api.KeysById`).

        Raises:
            UnknownEntry: an id has no vector, or its vectors were made from other tokens.
        """
        rows = self.rows(ids)
        if self._marks_N is not None:
            other = np.flatnonzero(self._marks_N[rows] != token_marks(tokens))
            if len(other):
                raise UnknownEntry(
                    f"the vectors in {self.path} were made from other tokens than {len(other)} of "
                    f"the entries have, such as entry {int(ids[other[0]])}; make the vectors again "
                    "from this content"
                )
        return torch.from_numpy(self.keys_NQ.take(rows, axis=0).astype(np.float32))

    def rows(self, ids: Int64Array) -> Int64Array:
        """Where these ids lie. Raises UnknownEntry, naming one that does not."""
        count = len(self.ids_N)
        if self._order_N is None:
            rows, found = ids, (ids >= 0) & (ids < count)
        else:
            at = np.searchsorted(self.ids_N, ids, sorter=self._order_N)
            rows = self._order_N[np.minimum(at, count - 1)]
            found = self.ids_N[rows] == ids
        if not bool(found.all()):
            raise UnknownEntry(
                f"{int((~found).sum())} entries have no vectors in {self.path}, such as entry "
                f"{int(ids[~found][0])}; make the vectors again from this content"
            )
        return rows

    def _gather(self, stored: FloatArray, ids: Tensor) -> Tensor:
        flat = ids.detach().cpu().reshape(-1).numpy()
        out = np.zeros((len(flat), *stored.shape[1:]), dtype=np.float32)
        real = flat >= 0
        if bool(real.any()):
            out[real] = stored.take(self.rows(flat[real]), axis=0)
        return torch.from_numpy(out).reshape(*ids.shape, *stored.shape[1:]).to(ids.device)


def token_marks(tokens_NS: npt.NDArray[Any]) -> Int64Array:
    """A number per row of tokens, int64 [N], which changes when a token does."""
    weights_S = _weights(tokens_NS.shape[1])
    marks = np.empty(len(tokens_NS), dtype=np.uint64)
    for start in range(0, len(tokens_NS), CHECK_ROWS):
        block = np.asarray(tokens_NS[start : start + CHECK_ROWS]).astype(np.uint64)
        marks[start : start + CHECK_ROWS] = ((block + 1) * weights_S).sum(1)  # wraps on purpose
    return marks.view(np.int64)


def _weights(count: int) -> npt.NDArray[np.uint64]:
    """Fixed odd numbers without a pattern: SplitMix64 (Steele, Lea and Flood 2014) of 1, 2, ..."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


def check_vectors(name: str, array: FloatArray, *, rows: int, axes: int) -> None:
    """Refuse what cannot be stored, block by block.

    Raises:
        ValueError: a wrong shape, type or order, NaN or infinity; names the array and the row.
    """
    if array.dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
        raise ValueError(f"{name} is {array.dtype}; float16 or float32 is needed")
    if array.ndim != axes or len(array) != rows or not all(array.shape[1:]):
        raise ValueError(
            f"{name} has shape {array.shape}; {axes} axes, the first of {rows} rows, are needed"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not in C order; save it with np.ascontiguousarray")
    for start in range(0, rows, CHECK_ROWS):
        finite = np.isfinite(array[start : start + CHECK_ROWS]).reshape(-1, _product(array))
        if not bool(finite.all()):
            bad = start + int(np.flatnonzero(~finite.all(axis=1))[0])
            raise ValueError(f"{name} has NaN or infinity in row {bad}; its numbers are not usable")


def _product(array: FloatArray) -> int:
    """Numbers of one row."""
    return int(np.prod(array.shape[1:]))


def _lists(array: FloatArray) -> pa.Array:
    """[N, width] as fixed-size lists, over the array's own bytes."""
    kind = pa.from_numpy_dtype(array.dtype)
    flat = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(array.reshape(-1))])
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(kind, array.shape[1]))


def _matrix(batch: pa.RecordBatch, name: str) -> FloatArray:
    column = batch.column(name)
    flat: FloatArray = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(batch.num_rows, column.type.list_size)
