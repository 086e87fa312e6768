"""New entries to segment files beside a store, a bounded number of rows in memory."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from memory_server.store.changes import Addition
from memory_server.store.segments import Segment, write_segment
from memory_server.store.store import Store

ROWS_PER_SEGMENT = 131_072


@dataclass
class _Rows:
    ids: list[int] = field(default_factory=list)
    doc_ids: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


class SegmentWriter:
    """Writes into `Store.incoming`; what no commit took is removed when the block is left."""

    def __init__(self, store: Store, *, rows_per_segment: int = ROWS_PER_SEGMENT) -> None:
        self._store = store
        self._most = rows_per_segment
        self._name = f"edit-{uuid.uuid4().hex}"
        self._open: dict[str, _Rows] = {}
        self._ids: list[NDArray[np.int64]] = []
        self.additions: list[Addition] = []

    def add(
        self,
        domain: str,
        *,
        entry_id: int,
        doc_id: int,
        tokens: NDArray[np.int64],
        text: str,
        title: str,
        source: str,
    ) -> None:
        """Take one entry, tokens int64 [S]."""
        rows = self._open.setdefault(domain, _Rows())
        rows.ids.append(entry_id)
        rows.doc_ids.append(doc_id)
        rows.tokens.append(tokens)
        rows.texts.append(text)
        rows.titles.append(title)
        rows.sources.append(source)
        if len(rows.ids) >= self._most:
            self._write(domain)

    def finish(self) -> None:
        """Write what is left; then `additions` are the segments of all entries."""
        for domain in list(self._open):
            self._write(domain)

    def repeated_id(self) -> int | None:
        """An id that was taken twice, or None."""
        waiting = [np.array(rows.ids, dtype=np.int64) for rows in self._open.values()]
        ids = np.sort(np.concatenate([*self._ids, *waiting, np.empty(0, dtype=np.int64)]))
        twice = ids[1:][ids[1:] == ids[:-1]]
        return int(twice[0]) if len(twice) else None

    def copy(self, segment: Segment, rows: NDArray[np.int64], domain: str) -> Addition:
        """Write some rows of a segment as one of their own."""
        strings = {
            name: segment.strings(name, rows.tolist()) for name in ("text", "title", "source")
        }
        path = self._next_path(domain)
        write_segment(
            path,
            ids=segment.ids[rows],
            doc_ids=segment.doc_ids[rows],
            tokens_NS=segment.tokens[rows],
            texts=strings["text"],
            titles=strings["title"],
            sources=strings["source"],
            meta=self._store.meta,
        )
        return self.additions[-1]

    def _write(self, domain: str) -> None:
        rows = self._open.pop(domain)
        ids = np.array(rows.ids, dtype=np.int64)
        self._ids.append(ids)
        # Refused later with the rows' places, which the segment's writer cannot name.
        if len(np.unique(ids)) < len(ids):
            return
        write_segment(
            self._next_path(domain),
            ids=ids,
            doc_ids=rows.doc_ids,
            tokens_NS=np.stack(rows.tokens),
            texts=rows.texts,
            titles=rows.titles,
            sources=rows.sources,
            meta=self._store.meta,
        )

    def _next_path(self, domain: str) -> Path:
        path = self._store.incoming / f"{self._name}-{len(self.additions):05d}.arrow"
        self.additions.append(Addition(path=path, domain=domain))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for addition in self.additions:
            Path(addition.path).unlink(missing_ok=True)
