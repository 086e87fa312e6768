"""Token sequences, memory-mapped: a folder of parts read without copying.

Arrow IPC parts are mapped where they lie. Parquet parts, and those of another filesystem, become
Arrow files in the machine's cache when the first sequence of them is wanted (`part_cache`).

Each part holds one record batch, because a gather on its zero-copy numpy view is a thousand times
faster than `ChunkedArray.take` over many chunks. Processes on a node share the page cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.data.part_cache import DEFAULT_CACHE_GIB, PartCache

Int64Array = NDArray[np.int64]
Int32Array = NDArray[np.int32]

# In a folder whose parts lie elsewhere: {"folder": URL, "parts": [names], "rows": [counts] or null,
# "sequence_length": tokens or null}.
ELSEWHERE = "elsewhere.json"

_PATTERN = "part-*"
_KINDS = (".arrow", ".parquet")
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
    """Read-only views of one mapped file `local` of N rows; tokens [N,T], the rest [N]."""

    local: Path
    tokens: NDArray[Any]
    doc_ids: Int64Array
    first_entry: Int32Array
    num_entries: Int32Array


class SequenceDataset:
    """The sequences of one folder, in the order of its parts' names.

    Opening reads the parts' footers only; a part is mapped when the first sequence of it is wanted.
    It pickles as its path: another process maps the files again. Reading is thread-safe.
    """

    def __init__(self, folder: Path | str, *, cache_gib: float = DEFAULT_CACHE_GIB) -> None:
        """Find all parts.

        Args:
            folder: with part-*.arrow or part-*.parquet, or with an `elsewhere.json`.
            cache_gib: GiB that fetched and decoded parts may take on this machine.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: it holds no parts or no sequences.
            SequencesDamaged: a part is truncated, has another schema or another length T.
            CacheError: a part cannot be fetched.
        """
        self.folder, self._cache_gib = Path(folder), cache_gib
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no sequences at {self.folder}: the folder does not exist; build the corpus first "
                "or correct the path"
            )
        self._cache = PartCache.of_this_machine(cache_gib)
        self._found, told_length = _find_parts(self.folder)
        self._parts: list[_Part | None] = [None] * len(self._found)
        for number, (where, rows) in enumerate(self._found):
            # A local Arrow file is mapped at once: that reads no more than its footer.
            if rows is None or (number == 0 and told_length is None):
                self._parts[number] = self._mapped(where)
        first = self._parts[0]
        self.sequence_length = told_length or (0 if first is None else first.tokens.shape[1])
        for (where, _), part in zip(self._found, self._parts, strict=True):
            if part is not None:
                self._check_length(where, part)
        self.rows = tuple(
            len(part.doc_ids) if part is not None else int(rows or 0)
            for part, (_, rows) in zip(self._parts, self._found, strict=True)
        )
        self._offsets = np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])
        if len(self) == 0:
            raise ValueError(
                f"the parts at {self.folder} hold no sequences; build the corpus again"
            )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __reduce__(self) -> tuple[Any, tuple[Path, float]]:
        return (_again, (self.folder, self._cache_gib))

    def _part(self, number: int) -> _Part:
        part = self._parts[number]
        if part is None:
            where, rows = self._found[number]
            part = self._mapped(where)
            self._let_go()
            self._check_length(where, part)
            if len(part.doc_ids) != rows:
                raise SequencesDamaged(
                    f"{where} holds {len(part.doc_ids)} sequences, but {rows} were told: it was "
                    "written again; build the corpus again, or empty the cache (PLUGLM_CACHE_DIR)"
                )
            self._parts[number] = part
        return part

    def _mapped(self, where: str) -> _Part:
        """The part, mapped where it lies or from the cache; blocks while it is fetched."""
        if "://" not in where and where.endswith(".arrow"):
            return _open_part(Path(where), where)
        with self._cache.held(where) as local:
            return _open_part(local, where)

    def _let_go(self) -> None:
        """Unmap parts that have left the cache: a file keeps its disk space while it is mapped."""
        for number, part in enumerate(self._parts):
            told = self._found[number][1] is not None
            if part is not None and told and not part.local.exists():
                self._parts[number] = None

    def _check_length(self, where: str, part: _Part) -> None:
        if part.tokens.shape[1] != self.sequence_length:
            raise SequencesDamaged(
                f"{where} holds sequences of {part.tokens.shape[1]} tokens but the others of "
                f"{self.sequence_length}: one folder has one length; build the corpus again"
            )

    def gather(self, indices: NDArray[np.integer]) -> SequenceBatch:
        """Read the sequences at these indices, in this order; repeats are allowed.

        Args:
            indices: integers [B] in [0, len).

        Raises:
            IndexError: an index is out of range.
            SequencesDamaged, CacheError: a part that is wanted for the first time is unusable.
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
            part = self._part(int(number))
            places = np.flatnonzero(part_of == number)
            rows = indices[places] - self._offsets[number]
            batch.input_ids[places] = np.take(part.tokens, rows, axis=0)
            batch.doc_ids[places] = part.doc_ids[rows]
            batch.first_entry[places] = part.first_entry[rows]
            batch.num_entries[places] = part.num_entries[rows]
        return batch


def _again(folder: Path, cache_gib: float) -> SequenceDataset:
    return SequenceDataset(folder, cache_gib=cache_gib)


def _find_parts(folder: Path) -> tuple[list[tuple[str, int | None]], int | None]:
    """(where each part is and its rows, where told; the length of all, where told)."""
    elsewhere = folder / ELSEWHERE
    length: int | None = None
    found: list[tuple[str, int | None]]
    if elsewhere.exists():
        try:
            told = json.loads(elsewhere.read_text(encoding="utf-8"))
            names, rows, length = told["parts"], told["rows"], told["sequence_length"]
            rows = rows or [None] * len(names)
            found = [(f"{told['folder']}/{n}", r) for n, r in zip(names, rows, strict=True)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SequencesDamaged(
                f"{elsewhere} cannot be read ({error}); remove {folder.parent}, and it is fetched "
                "again"
            ) from error
    else:
        paths = sorted(p for p in folder.glob(_PATTERN) if p.suffix in _KINDS)
        found = [(str(path), _parquet_rows(path)) for path in paths]
    if not found:
        raise ValueError(
            f"no sequences at {folder}: it holds no part-*.arrow or part-*.parquet; build the "
            "corpus again"
        )
    return found, length


def _parquet_rows(path: Path) -> int | None:
    """Rows by the footer of a Parquet file; None for Arrow, which is mapped to know."""
    if path.suffix != ".parquet":
        return None
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise SequencesDamaged(
            f"{path} is truncated, damaged or not a Parquet file ({error}); write it again"
        ) from error


def _open_part(local: Path, path: str) -> _Part:
    """Map a local file; errors name where the part is."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(local)))
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
        local=local,
        tokens=tokens.flatten().to_numpy(zero_copy_only=True).reshape(-1, length),
        doc_ids=batch.column("doc_id").to_numpy(zero_copy_only=True),
        first_entry=batch.column("first_entry").to_numpy(zero_copy_only=True),
        num_entries=batch.column("num_entries").to_numpy(zero_copy_only=True),
    )


def _check_schema(path: str, batch: pa.RecordBatch) -> None:
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
