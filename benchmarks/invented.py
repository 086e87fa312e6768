"""Invented stores and texts, for benchmarks that need a size and no meaning."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_server.store.segments import write_segment
from memory_server.store.store import Store

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
_WORDS = 20_000


def write_store(path: Path, tokens_NS: NDArray[Any], *, vocab_size: int) -> Store:
    """A store of one segment whose entries have these tokens, four to a document.

    Args:
        path: where; holds no store yet.
        tokens_NS: int [N,S], in [0, vocab_size), padded with 0.
        vocab_size: of the tokenizer that there is none of.
    """
    entries, entry_tokens = tokens_NS.shape
    store = Store.create(
        path,
        tokenizer_fingerprint="none",
        entry_tokens=entry_tokens,
        vocab_size=vocab_size,
        pad_token_id=0,
    )
    rows = np.arange(entries)
    empty = [""] * entries
    write_segment(
        store.incoming / "all.arrow",
        ids=rows,
        doc_ids=rows // 4,
        tokens_NS=tokens_NS,
        texts=empty,
        titles=empty,
        sources=empty,
        meta=store.meta,
    )
    store.commit(add_segments=[store.incoming / "all.arrow"], message="benchmark")
    return store


def write_documents(path: Path, documents: int, *, seed: int = 0) -> None:
    """JSON Lines of invented words, as frequent as words are (Zipf), 60 to 240 to a document."""
    chance = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        words["".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4)))] = None
    vocabulary = list(words)
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            sentences = [
                " ".join(chance.choices(vocabulary, weights, k=12)) + "."
                for _ in range(chance.randint(5, 20))
            ]
            row = {"title": f"document {number}", "text": " ".join(sentences)}
            file.write(json.dumps(row) + "\n")
