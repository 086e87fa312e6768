"""A memory with a FAISS index, from outside: exact until it knows the queries, then fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_server.api import Retrieved
from memory_server.errors import MemoryClosed
from memory_server.index.base import IndexSettings
from memory_server.index.faiss_presets import SMALLEST_BLOCK
from memory_server.local import LocalMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from tests.toy_memory import (
    ENTRY_TOKENS,
    KEY_WIDTH,
    VOCAB,
    ToyEncoder,
    empty_store,
    toy_factory,
)

ENTRIES, WAIT_S = SMALLEST_BLOCK + 500, 120.0


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (ENTRIES, ENTRY_TOKENS))


@pytest.fixture
def store(tmp_path: Path, tokens: np.ndarray) -> Store:
    store = empty_store(tmp_path / "store")
    path = store.incoming / "entries.arrow"
    write_segment(
        path,
        ids=np.arange(ENTRIES),
        doc_ids=np.arange(ENTRIES) // 2,
        tokens_NS=tokens,
        texts=[""] * ENTRIES,
        titles=[""] * ENTRIES,
        sources=["toy"] * ENTRIES,
        meta=store.meta,
    )
    store.commit(add_segments=[path], message="entries")
    return store


def weights_of(drift: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, KEY_WIDTH, generator=generator)
    return {"table": table + drift * torch.randn(VOCAB, KEY_WIDTH, generator=generator)}


def queries_of(tokens: np.ndarray, weights: dict[str, Tensor], seed: int) -> Tensor:
    chosen = np.random.default_rng(seed).integers(0, ENTRIES, 64)
    return ToyEncoder(weights)(torch.from_numpy(tokens[chosen]))


def found(one: Retrieved, other: Retrieved) -> float:
    same = (one.ids.unsqueeze(2) == other.ids.unsqueeze(1)).any(2)
    return float(same.float().mean())


def go_live(memory: LocalMemory, epoch: int) -> None:
    memory.wait_sealed(epoch, WAIT_S)
    memory.activate(epoch)


def test_an_audit_can_be_asked_for(store: Store, tokens: np.ndarray) -> None:
    settings = IndexSettings(kind="ivf", search="nprobe=96", min_recall=0.7, audit_every_s=3600)
    weights = weights_of(0.0)
    with LocalMemory(store, encoder=toy_factory, weights=weights, index=settings) as memory:
        assert memory.audit().recall is None
        for few in queries_of(tokens, weights, 1).split(8):
            assert memory.search(few, 5).exact
        report = memory.audit()
        assert not report.exact
        assert report.recall is not None
        assert report.recall > 0.7
        assert not memory.search(queries_of(tokens, weights, 2), 5).exact
    with pytest.raises(MemoryClosed):
        memory.audit()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["ivf", "pq"])
def test_exact_then_fast_then_edited(
    store: Store, tokens: np.ndarray, kind: str, dtype: str
) -> None:
    search = {"ivf": "nprobe=96", "pq": "nprobe=32"}[kind]
    settings = IndexSettings(kind=kind, search=search, min_recall=0.7, key_dtype=dtype)  # type: ignore[arg-type]
    first, second = weights_of(0.0), weights_of(0.02)
    with LocalMemory(store, encoder=toy_factory, weights=first, index=settings) as memory:
        for few in queries_of(tokens, first, 1).split(8):
            assert memory.search(few, 5).exact
        go_live(memory, memory.stage(encoder_step=1, weights=second))
        queries = queries_of(tokens, second, 2)
        fast = memory.search(queries, 5)
        assert not fast.exact
        true = memory.search(queries, 5, exact=True)
        assert true.exact
        assert found(fast, true) > 0.7
        gone = true.ids[:, :3].flatten().unique().tolist()
        version = store.commit(remove_ids=gone, message="forget")
        go_live(memory, memory.stage(encoder_step=1, content_version=version))
        after = memory.search(queries, 5)
        assert not after.exact
        assert not set(gone) & set(after.ids.flatten().tolist())
        assert bool((after.ids >= 0).all())
        own = memory.search(queries, 5, exclude_doc_ids=after.doc_ids[:, 0])
        assert not bool((own.doc_ids == after.doc_ids[:, :1]).any())
        assert (
            found(own, memory.search(queries, 5, exclude_doc_ids=after.doc_ids[:, 0], exact=True))
            > 0.7
        )
