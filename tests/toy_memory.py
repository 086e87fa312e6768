"""A tiny store and a tiny encoder, so that tests can work out every answer themselves."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory_server.api import KeyEncoder
from memory_server.store.files import Files
from memory_server.store.segments import write_segment
from memory_server.store.store import Store

VOCAB, ENTRY_TOKENS, KEY_WIDTH, PAD = 50, 6, 8, 0


@dataclass(frozen=True)
class ToyEntry:
    id: int
    doc_id: int
    tokens: tuple[int, ...]
    text: str


def toy_weights(seed: int, *, width: int = KEY_WIDTH) -> dict[str, Tensor]:
    """Small whole numbers: inner products are exact, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return {"table": torch.randint(-2, 3, (VOCAB, width), generator=generator).float()}


class ToyEncoder:
    """The key is the sum of its tokens' rows. A table with `slow` waits before each batch."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._table = weights["table"]
        self._pause_s = float(weights["slow"]) if "slow" in weights else 0.0

    def __call__(self, tokens_nS: Tensor) -> Tensor:
        if self._pause_s:
            time.sleep(self._pause_s)
        return self._table[tokens_nS].sum(1)


def toy_factory(weights: Mapping[str, Tensor]) -> KeyEncoder:
    return ToyEncoder(weights)


def toy_entries(ids: Sequence[int], *, seed: int = 0, per_document: int = 3) -> list[ToyEntry]:
    """Entries whose document follows from their id, with random tokens."""
    random = np.random.default_rng([seed, *ids])
    rows = random.integers(1, VOCAB, (len(ids), ENTRY_TOKENS))
    return [
        ToyEntry(i, i // per_document, tuple(int(t) for t in row), f"text {i} of {seed}")
        for i, row in zip(ids, rows, strict=True)
    ]


def empty_store(path: Path, **options: object) -> Store:
    return Store.create(
        path,
        tokenizer_fingerprint="toy",
        entry_tokens=ENTRY_TOKENS,
        vocab_size=VOCAB,
        pad_token_id=PAD,
        **options,  # type: ignore[arg-type]
    )


def write_toy_segment(
    store: Store, name: str, entries: Sequence[ToyEntry], *, files: Files | None = None
) -> Path:
    path = store.incoming / f"{name}.arrow"
    write_segment(
        path,
        ids=[e.id for e in entries],
        doc_ids=[e.doc_id for e in entries],
        tokens_NS=np.array([e.tokens for e in entries]).reshape(len(entries), ENTRY_TOKENS),
        texts=[e.text for e in entries],
        titles=[f"title {e.id}" for e in entries],
        sources=["toy" for _ in entries],
        meta=store.meta,
        files=files,
    )
    return path


def toy_store(path: Path, *segments: Sequence[ToyEntry]) -> Store:
    store = empty_store(path)
    paths = [write_toy_segment(store, f"s{n}", entries) for n, entries in enumerate(segments)]
    store.commit(add_segments=paths, message="first entries")
    return store


def expected_ids(
    entries: Sequence[ToyEntry],
    weights: Mapping[str, Tensor],
    queries_BQ: Tensor,
    k: int,
    exclude: Sequence[int] | None = None,
) -> list[list[int]]:
    """The right answer by the plainest means: every score in python, sorted."""
    table = weights["table"].tolist()
    keys = [
        [sum(table[token][q] for token in entry.tokens) for q in range(len(table[0]))]
        for entry in entries
    ]
    reply = []
    for b, query in enumerate(queries_BQ.tolist()):
        scored = [
            (-sum(x * y for x, y in zip(query, key, strict=True)), entry.id)
            for entry, key in zip(entries, keys, strict=True)
            if exclude is None or entry.doc_id != exclude[b]
        ]
        best = [entry_id for _, entry_id in sorted(scored)[:k]]
        reply.append(best + [-1] * (k - len(best)))
    return reply


def toy_queries(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (batch, KEY_WIDTH), generator=generator).float()
