"""Chunks' parts to the finished files: entry ids are dealt, parts joined, the memory committed.

Entry ids run on from chunk to chunk, so they are known only when all chunks are. Each task joins
consecutive chunks to one file, so memory holds one file per process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from memory_server.store.segments import SegmentMeta, write_segment
from trainer.corpus.encode import ENTRIES, ChunkDone, chunk_directory
from trainer.corpus.parts import (
    SEQUENCE_COLUMNS,
    Int64Array,
    read_batch,
    token_column,
    token_rows,
    write_batch,
)


@dataclass(frozen=True, kw_only=True)
class JoinTask:
    """Consecutive chunks to one file of `kind`. `first_ids` is each chunk's first entry id."""

    kind: str
    file: str
    chunks: tuple[str, ...]
    first_ids: tuple[int, ...]
    meta: SegmentMeta


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A finished file, and its tokens' counts (int64 [V]) if it holds sequences."""

    kind: str
    file: str
    rows: int
    counts: Int64Array | None


def plan(
    kind: str,
    done: Sequence[ChunkDone],
    chunks: Path,
    out: Path,
    rows_per_file: int,
    meta: SegmentMeta,
) -> list[JoinTask]:
    """Deal chunks to files of at least `rows_per_file` rows, but for the last; never to none.

    Args:
        kind: "entries", "sequences" or "heldout".
        done: all chunks in order.
    """
    first_ids = _first_ids(done)
    groups: list[list[int]] = [[]]
    rows = 0
    for place, chunk in enumerate(done):
        if rows >= rows_per_file:
            groups.append([])
            rows = 0
        groups[-1].append(place)
        rows += int(getattr(chunk, kind))  # the kinds are named as the counts
    return [
        JoinTask(
            kind=kind,
            file=str(out / f"part-{number:05d}.arrow"),
            chunks=tuple(str(chunk_directory(chunks, done[place].index)) for place in group),
            first_ids=tuple(first_ids[place] for place in group),
            meta=meta,
        )
        for number, group in enumerate(groups)
    ]


def join(task: JoinTask) -> Joined:
    """Write one finished file."""
    batches = [read_batch(Path(chunk) / f"{task.kind}.arrow") for chunk in task.chunks]
    rows = sum(batch.num_rows for batch in batches)
    if task.kind == ENTRIES:
        _write_segment(task, batches)
        return Joined(kind=task.kind, file=task.file, rows=rows, counts=None)
    tokens = np.concatenate([token_rows(batch, SEQUENCE_COLUMNS[0]) for batch in batches])
    columns = {SEQUENCE_COLUMNS[0]: token_column(tokens)}
    for name in SEQUENCE_COLUMNS[1:]:
        columns[name] = pa.concat_arrays([batch.column(name) for batch in batches])
    write_batch(Path(task.file), columns)
    counts = np.bincount(tokens.reshape(-1), minlength=task.meta.vocab_size).astype(np.int64)
    return Joined(kind=task.kind, file=task.file, rows=rows, counts=counts)


def _first_ids(done: Sequence[ChunkDone]) -> list[int]:
    """Each chunk's first entry id: its source's base plus the entries of the source before it."""
    following: dict[int, int] = {}
    first = []
    for chunk in done:
        start = following.setdefault(chunk.base, chunk.base)
        first.append(start)
        following[chunk.base] = start + chunk.entries
    return first


def _write_segment(task: JoinTask, batches: Sequence[pa.RecordBatch]) -> None:
    def strings(name: str) -> Iterator[str]:
        for batch in batches:
            yield from batch.column(name).to_pylist()

    ids = [
        np.arange(first, first + batch.num_rows, dtype=np.int64)
        for first, batch in zip(task.first_ids, batches, strict=True)
    ]
    write_segment(
        task.file,
        ids=np.concatenate(ids),
        doc_ids=np.concatenate([batch.column("doc_id").to_numpy() for batch in batches]),
        tokens_NS=np.concatenate([token_rows(batch, "tokens") for batch in batches]),
        texts=list(strings("text")),
        titles=list(strings("title")),
        sources=list(strings("source")),
        meta=task.meta,
    )
