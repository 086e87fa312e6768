"""Some domains of an epoch, searched as if nothing else was in it.

A domain is a set of segments, so its keys are spans of the epoch's blocks: an index over them
shares the keys. It answers bit for bit as a memory of only these domains does, as exact scores
depend on nothing but query and key. It is always exact: an approximate index knows only whole
blocks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_server.index.base import ExactKeys, Hits, IndexInput
from memory_server.index.flat_index import FlatIndex
from memory_server.keys.key_blocks import BlockedKeys
from memory_server.shard.content import ShardContent

SETS_KEPT = 8

Span = tuple[int, int]


@dataclass(frozen=True)
class _DomainIndex:
    """An index over some rows of an epoch. `rows`: int64, the epoch's row of each of its own."""

    index: FlatIndex
    rows: Tensor

    def search(self, queries_BQ: Tensor, k: int, excluded_B: Tensor | None, *, exact: bool) -> Hits:
        hits = self.index.search(queries_BQ, k, excluded_B, exact=exact)
        if not len(self.rows):
            return hits
        rows_BK = self.rows[hits.rows.clamp(min=0)].masked_fill(hits.rows < 0, -1)
        return Hits(rows=rows_BK, scores=hits.scores, exact=hits.exact)


class DomainIndexes:
    """The indexes of one epoch by sets of domains, built when first asked for; the last few are
    kept, with about 25 bytes per row of theirs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[frozenset[str], _DomainIndex] = OrderedDict()

    def search(
        self,
        content: ShardContent,
        rows: IndexInput,
        domains: Collection[str],
        queries_BQ: Tensor,
        k: int,
        excluded_B: Tensor | None,
        *,
        exact: bool,
    ) -> Hits:
        """As `Index.search`, of the rows of these domains alone; rows are the epoch's.

        Args:
            content: of the epoch. rows: what its index was built from.

        Raises:
            UnknownDomain: the content has not all of them.
        """
        wanted = frozenset(domains)
        # Under the lock, so that two searches do not build the same.
        with self._lock:
            index = self._kept.get(wanted)
            if index is None:
                content.check_domains(domains)
                index = _build(rows, content.spans_of(wanted))
                self._kept[wanted] = index
                if len(self._kept) > SETS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(wanted)
        return index.search(queries_BQ, k, excluded_B, exact=exact)


def _build(rows: IndexInput, spans: list[Span]) -> _DomainIndex:
    keys, device = rows.keys, rows.keys.device
    parts = []
    for view in keys.views:
        for low, high in spans:
            first, last = max(low, view.offset), min(high, view.offset + view.rows)
            if first < last:
                at = view.start - view.offset
                parts.append((view.block, first + at, last + at))
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    chosen = torch.cat([nothing, *(torch.arange(a, b, device=device) for a, b in spans)])
    is_dead = torch.zeros(keys.rows, dtype=torch.bool, device=device)
    is_dead[rows.dead_rows] = True
    part = IndexInput(
        keys=BlockedKeys(parts, keys.width, device),
        ids_N=_of_spans(rows.ids_N, spans),
        doc_ids_N=_of_spans(rows.doc_ids_N, spans),
        dead_rows=_of_spans(is_dead, spans).nonzero().squeeze(1),
        exact_keys=None if rows.exact_keys is None else _of_rows(rows.exact_keys, chosen),
    )
    return _DomainIndex(FlatIndex(part), chosen)


def _of_spans(values_N: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([values_N[:0], *(values_N[first:last] for first, last in spans)])


def _of_rows(exact_keys: ExactKeys, chosen: Tensor) -> ExactKeys:
    at = chosen.cpu().numpy()
    return lambda rows: exact_keys(at[rows])
