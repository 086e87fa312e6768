"""A forward pass in chunks of the batch: while one chunk's search is under way, others compute.

A chunk runs up to a memory layer's query, its search is begun, and the next chunk runs. With
`query_norm` "batch" a query needs the statistics of the whole batch, so there all chunks come to
that point before any is searched; what hides the search is then the layer's own feed-forward part
and what follows for the chunks that are answered already. Either way the result is that of the
whole batch, apart from the order of dropout's draws and of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from model.layers import MemoryLayer
from model.query_norm import QueryBatchNorm
from model.reading import asked_queries
from model.recompute import run_layer
from model.retrieval import LayerRetrieval, Lookup, ReadMemory, RetrievedEntries
from model.rows import Rows, Selection

Pending = Callable[[], RetrievedEntries]
"""Waits for a search that was begun, and gives its answer."""


@runtime_checkable
class Startable(Protocol):
    """A lookup whose searches can be begun, and waited for later."""

    def start(self, queries_BQ: Tensor) -> Pending:
        """Begin a search for queries float32 [B,Q], detached."""
        ...

    def __call__(self, queries_BQ: Tensor) -> RetrievedEntries: ...


@dataclass(frozen=True)
class JoinedEntries:
    """The answers of all chunks, below each other."""

    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


@dataclass
class _Chunk:
    """Some of the batch's sequences on their way through the layers."""

    x: Tensor
    rows: Rows
    chosen: Selection | None
    a: Tensor | None = None
    raw_BQ: Tensor | None = None
    query_BQ: Tensor | None = None
    pending: Pending | None = None
    beside: Tensor | None = None
    retrievals: list[LayerRetrieval] = field(default_factory=list)


class _Begun:
    """A lookup that gives the answer of a search that was begun."""

    takes_any_query = True  # it has been looked at when the search was begun

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def __call__(self, queries_BQ: Tensor) -> RetrievedEntries:
        return self._pending()


def run_in_chunks(
    layers: Sequence[nn.Module],
    x: Tensor,
    rows: Rows,
    *,
    lookup: Startable,
    reader: Callable[[Lookup, int], ReadMemory],
    wanted_BT: Tensor | None,
    chunks: int,
    recompute: bool,
    pack: bool,
    output_attention: bool,
) -> tuple[Tensor, list[LayerRetrieval]]:
    """All layers of a model, of which the last ones read the memory.

    Args:
        x: embeddings in the layout `rows`.
        reader: makes what a memory layer reads with, from a lookup and the layer's index.
        wanted_BT: bool, the positions whose output is wanted; None: all.
        chunks: at most one for each sequence.
        recompute: the plain layers' activations are made again for their gradient; the memory
            layers' are kept.
        pack: leave padding out.

    Returns:
        (last hidden state [m,H] of the wanted positions, or [B,T,H]; what each layer retrieved)
    """
    x_BTH = rows.unpack(x)
    parts = []
    for mask_bT, x_bTH, *wanted in zip(
        rows.mask_BT.chunk(chunks),
        x_BTH.chunk(chunks),
        *([] if wanted_BT is None else [wanted_BT.chunk(chunks)]),
        strict=True,
    ):
        layout = Rows(mask_bT, full=True) if rows.full else Rows.of_tokens(mask_bT, pack=pack)
        chosen = layout.select(wanted[0]) if wanted else None
        parts.append(_Chunk(layout.pack(x_bTH), layout, chosen))
    last = len(layers) - 1
    first_memory = next(i for i, layer in enumerate(layers) if isinstance(layer, MemoryLayer))
    for i, layer in enumerate(layers):
        if not isinstance(layer, MemoryLayer):
            continue
        together = isinstance(layer.query_norm, QueryBatchNorm)
        for part in parts:
            if i == first_memory:
                for plain in layers[:first_memory]:
                    part.x = run_layer(plain, recompute, part.x, part.rows)
            part.a, part.raw_BQ = layer.before_query(part.x, part.rows)
            if not together:
                part.query_BQ = layer.query_norm(part.raw_BQ)
                part.pending = lookup.start(asked_queries(part.query_BQ, lookup, layer.index))
        if together:
            _normalise_together(layer, parts)
            for part in parts:
                assert part.query_BQ is not None
                part.pending = lookup.start(asked_queries(part.query_BQ, lookup, layer.index))
        for part in parts:
            _finish(layer, part, reader, wanted=i == last, output_attention=output_attention)
    every = [part.retrievals for part in parts]
    joined = [_joined(of_chunks) for of_chunks in zip(*every, strict=True)]
    if wanted_BT is not None:
        return torch.cat([part.x for part in parts]), joined
    return torch.cat([part.rows.unpack(part.x) for part in parts]), joined


def _normalise_together(layer: MemoryLayer, parts: Sequence[_Chunk]) -> None:
    raw_BQ = torch.cat([part.raw_BQ for part in parts if part.raw_BQ is not None])
    sizes = [len(part.rows.mask_BT) for part in parts]
    query_BQ = layer.query_norm(raw_BQ)
    for part, query_bQ in zip(parts, query_BQ.split(sizes), strict=True):
        part.query_BQ = query_bQ


def _finish(
    layer: MemoryLayer,
    part: _Chunk,
    reader: Callable[[Lookup, int], ReadMemory],
    *,
    wanted: bool,
    output_attention: bool,
) -> None:
    """What needs no answer first, then the rest."""
    assert part.a is not None
    assert part.query_BQ is not None
    assert part.pending is not None
    chosen = part.chosen if wanted else None
    a, rows, late = layer.narrowed(part.a, part.rows, chosen)
    beside = layer.beside_memory(a)
    entries = reader(_Begun(part.pending), layer.index)(part.query_BQ)
    part.x, retrieval = layer.after_answer(
        a, rows, part.query_BQ, entries, beside=beside, late=late, output_attention=output_attention
    )
    part.a = part.raw_BQ = part.query_BQ = part.pending = None
    part.retrievals.append(retrieval)


def _joined(parts: Sequence[LayerRetrieval]) -> LayerRetrieval:
    answers = [part.retrieved for part in parts]
    attention = [part.attention_BATK for part in parts if part.attention_BATK is not None]
    asking = [part.asking_BT for part in parts if part.asking_BT is not None]
    return LayerRetrieval(
        layer=parts[0].layer,
        query_BQ=torch.cat([part.query_BQ for part in parts]),
        key_BKQ=torch.cat([part.key_BKQ for part in parts]),
        retrieved=JoinedEntries(
            ids=torch.cat([answer.ids for answer in answers]),
            tokens=torch.cat([answer.tokens for answer in answers]),
            doc_ids=torch.cat([answer.doc_ids for answer in answers]),
        ),
        attention_BATK=_joined_padded(attention, dim=2),
        asking_BT=_joined_padded(asking, dim=1),
    )


def _joined_padded(parts: Sequence[Tensor], *, dim: int) -> Tensor | None:
    """Joined along the batch; chunks may have another longest P at `dim`, padded with zeros."""
    if not parts:
        return None
    longest = max(part.shape[dim] for part in parts)
    behind = (0, 0) * (parts[0].ndim - 1 - dim)
    padded = [nn.functional.pad(p, (*behind, 0, longest - p.shape[dim])) for p in parts]
    return torch.cat(padded)
