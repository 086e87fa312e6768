"""FAISS answers alike for shards on the CPU and on a GPU. The GPU's needs a FAISS built for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memory_server.index.approximate_index import ApproximateIndex
from memory_server.index.base import IndexInput, IndexSettings
from memory_server.index.factory import build_index, check_index
from memory_server.index.faiss_gpu import gpu_count, gpu_trouble
from memory_server.index.faiss_presets import SMALLEST_BLOCK
from memory_server.index.recall_audit import recall_at_k
from tests.keys_in_blocks import block_of, by_full_sort, clustered_keys, near, recent, rows_of

WIDTH, LARGE, SMALL = 16, SMALLEST_BLOCK + 2_000, 300
KEYS = clustered_keys(LARGE + SMALL, WIDTH)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda" and (trouble := gpu_trouble()):
        pytest.skip(f"this FAISS cannot search on this GPU: {trouble}")
    return name


def on(device: str, keys: torch.Tensor, dead: range = range(0)) -> IndexInput:
    large = block_of(keys[:LARGE].to(device))
    small = block_of(keys[LARGE:].to(device), segment="small")
    parts = [(large, 0, LARGE), (small, 0, len(keys) - LARGE)]
    return rows_of(parts, docs=torch.arange(len(keys)) // 5, dead=dead, device=device)


def built(kind: str, rows: IndexInput, search: str = "", **options: object) -> ApproximateIndex:
    settings = IndexSettings(kind=kind, search=search, min_recall=0.5)
    check_index(settings, key_width=WIDTH, device=rows.keys.device)
    index = build_index(settings, rows, recent_queries=recent(near(KEYS, 64)), **options)  # type: ignore[arg-type]
    assert isinstance(index, ApproximateIndex)
    assert index.accelerated_rows == LARGE
    return index


@pytest.mark.parametrize("removed", [0, 15_000])
def test_all_lists_find_what_a_full_sort_finds(device: str, removed: int) -> None:
    dead = range(1_000, 1_000 + removed)
    index = built("IVF16,Flat", on(device, KEYS, dead), "nprobe=16")
    queries = near(KEYS, 32)
    docs = torch.arange(len(KEYS)) // 5
    best, _ = by_full_sort(KEYS, queries, 1, dead=dead)
    exclude = docs[best[:, 0]]
    hits = index.search(queries.to(device), 9, exclude.to(device))
    rows, scores = by_full_sort(KEYS, queries, 9, docs=docs, dead=dead, exclude=exclude)
    assert hits.rows.device.type == device
    assert not hits.exact
    assert torch.equal(hits.rows.cpu(), rows)
    assert torch.equal(hits.scores.cpu(), scores)


def test_the_preset_finds_nearly_all_and_keeps_its_lists(device: str) -> None:
    first = built("ivf", on(device, KEYS), "nprobe=64")
    drifted = KEYS + 0.05 * torch.randn(KEYS.shape, generator=torch.Generator().manual_seed(3))
    second = built("ivf", on(device, drifted), "nprobe=64", previous=first)
    assert not second.parts[0].accelerator.trained_anew
    queries = near(drifted, 64)
    hits = second.search_approximately(queries.to(device), 5, None)
    assert recall_at_k(hits.rows.cpu(), by_full_sort(drifted, queries, 5)[0]) > 0.95


def test_searches_side_by_side(device: str) -> None:
    index = built("ivf", on(device, KEYS, range(500)))
    batches = [near(KEYS, 16, seed=seed).to(device) for seed in range(8)]
    alone = [index.search_approximately(queries, 5, None).rows for queries in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda queries: index.search_approximately(queries, 5, None).rows, batches)
        )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_what_no_gpu_can_do_is_refused() -> None:
    words = "4-bit codes"
    if trouble := gpu_trouble():
        words = "cannot search on this GPU" if gpu_count() else "needs a FAISS that sees this GPU"
        assert trouble
    with pytest.raises(ValueError, match=words):
        check_index(IndexSettings(kind="pq"), device="cuda")
