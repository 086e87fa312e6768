"""Positive entries: for each training sequence, a memory entry of the same document.

The retrieval warm-up pulls a masked sequence's query towards the key of an entry that tells what
was masked. The store's columns are read where they lie, memory-mapped: nothing here grows with the
memory, except that a segment whose documents are out of order is sorted once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory_server.store.segments import Segment
from memory_server.store.store import Store
from trainer.data import rng
from trainer.data.sequences import SequenceBatch

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Positives:
    """Entries chosen for B sequences.

    Attributes:
        tokens: int64 [B,S], the entries' tokens; all padding where there is none.
        entry_ids: int64 [B]; -1 where the document has no entry.
    """

    tokens: Int64Array
    entry_ids: Int64Array


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one segment holds for B documents, counted in live entries from the segment's start."""

    rows: _DocumentRows
    begin: Int64Array
    end: Int64Array
    cover_begin: Int64Array
    cover_end: Int64Array


class PositiveEntries:
    """Chooses entries among those that live in one content version of a store."""

    def __init__(
        self,
        store: Store,
        content_version: str | None = None,
        *,
        domains: Collection[str] = (),
    ) -> None:
        """Map the version's segments, of some domains or of all; None means the store's head.

        Raises:
            memory_server.errors.UnknownVersion: the store has no such version.
            memory_server.errors.StoreDamaged: a file is damaged; names it.
        """
        manifest = store.manifest(content_version)
        self.content_version: str = manifest.version
        self._entry_tokens = store.meta.entry_tokens
        self._pad_token_id = store.meta.pad_token_id
        self._segments = [
            _DocumentRows(store.segment(ref), store.deleted_rows(ref))
            for ref in manifest.of_domains(domains)
            if ref.rows
        ]

    def choose(
        self,
        batch: SequenceBatch,
        *,
        seed: int,
        epochs_B: NDArray[np.integer],
        indices_B: NDArray[np.integer],
    ) -> Positives:
        """Choose one entry for each sequence, uniformly among the live ones that cover it.

        Where none is left that covers it, or the sequence does not say which do (first_entry -1),
        any live entry of its document is as good as another. The choice depends on (seed, epoch,
        index of the sequence) only.

        Args:
            batch: sequences with the ordinals of their entries within the document: rows of the
                document in the order of the version's segments, removed ones included.
            seed: seed of the draw.
            epochs_B: epoch that each sequence is seen in.
            indices_B: index of each sequence in its dataset.
        """
        found = self._find(batch)
        size = len(batch.doc_ids)
        covering, available = np.zeros((2, size), dtype=np.int64)
        for part in found:
            covering += part.cover_end - part.cover_begin
            available += part.end - part.begin
        total = np.where(covering > 0, covering, available)
        key = rng.derive_key(seed, epochs_B, indices_B, rng.Purpose.POSITIVE)
        left_B = (rng.uniform(key, 0) * total).astype(np.int64)
        tokens = np.full((size, self._entry_tokens), self._pad_token_id, dtype=np.int64)
        entry_ids = np.full(size, -1, dtype=np.int64)
        for part in found:
            begin = np.where(covering > 0, part.cover_begin, part.begin)
            count = np.where(covering > 0, part.cover_end, part.end) - begin
            here = np.flatnonzero((left_B >= 0) & (left_B < count))
            rows = part.rows.live_rows(begin[here] + left_B[here])
            entry_ids[here] = part.rows.segment.ids[rows]
            tokens[here] = np.take(part.rows.segment.tokens, rows, axis=0)
            # Once drawn the number turns negative, and no later segment claims the sequence.
            left_B -= count
        return Positives(tokens=tokens, entry_ids=entry_ids)

    def _find(self, batch: SequenceBatch) -> list[_Found]:
        docs = batch.doc_ids
        first = batch.first_entry.astype(np.int64)
        known = (first >= 0) & (batch.num_entries > 0)
        found: list[_Found] = []
        rows_before = np.zeros(len(docs), dtype=np.int64)
        for rows in self._segments:
            if not ((docs >= rows.first_doc) & (docs <= rows.last_doc)).any():
                continue
            begin, end = rows.span(docs)
            wanted = begin + first - rows_before
            cover_begin = np.where(known, np.clip(wanted, begin, end), begin)
            cover_end = np.where(known, np.clip(wanted + batch.num_entries, begin, end), begin)
            rows_before += end - begin
            found.append(
                _Found(
                    rows=rows,
                    begin=rows.live_before(begin),
                    end=rows.live_before(end),
                    cover_begin=rows.live_before(cover_begin),
                    cover_end=rows.live_before(cover_end),
                )
            )
        return found


class _DocumentRows:
    """One segment's rows by document. Positions are rows in the order of their documents."""

    def __init__(self, segment: Segment, deleted_rows: Int64Array) -> None:
        self.segment = segment
        docs = segment.doc_ids
        self._order: Int64Array | None = None
        deleted = deleted_rows
        if not bool((docs[1:] >= docs[:-1]).all()):
            # The corpus writes documents in order; segments of edits need not.
            self._order = np.argsort(docs, kind="stable")
            docs = docs[self._order]
            deleted = np.sort(np.argsort(self._order)[deleted_rows])
        self._docs = docs
        self._deleted = deleted
        self._live_before_deleted = deleted - np.arange(len(deleted))
        self.first_doc, self.last_doc = int(docs[0]), int(docs[-1])

    def span(self, docs_B: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the positions [begin, end) of each document, empty where it is not here."""
        begin = np.searchsorted(self._docs, docs_B, side="left")
        return begin, np.searchsorted(self._docs, docs_B, side="right")

    def live_before(self, positions: Int64Array) -> Int64Array:
        """Return how many live entries lie before each position."""
        return positions - np.searchsorted(self._deleted, positions, side="left")

    def live_rows(self, numbers: Int64Array) -> Int64Array:
        """Return the rows of the live entries with these numbers, counted from 0."""
        positions = numbers + np.searchsorted(self._live_before_deleted, numbers, side="right")
        return positions if self._order is None else self._order[positions]
