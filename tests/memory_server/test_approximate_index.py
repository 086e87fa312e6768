"""FAISS inside the memory: exact scores, nothing that is removed or excluded, K results always."""

from __future__ import annotations

import dataclasses
import threading

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_server.index.approximate_index import ApproximateIndex
from memory_server.index.base import IndexSettings
from memory_server.index.factory import (
    build_index,
    check_index,
    expected_index_bytes,
    training_bytes,
)
from memory_server.index.faiss_presets import SMALLEST_BLOCK
from memory_server.index.recall_audit import recall_at_k
from tests.keys_in_blocks import block_of, by_full_sort, clustered_keys, near, recent, rows_of

WIDTH, LARGE, SMALL = 16, SMALLEST_BLOCK + 2_000, 300
KEYS = clustered_keys(LARGE + SMALL, WIDTH)
EVERYTHING = {  # what finds all, so that answers can be compared row by row
    "IVF16,Flat": "nprobe=16",
    "RR16,IVF16,Flat": "nprobe=16",
    "Flat": "",
}
LOSSY = {"pq": "", "ivf": "nprobe=1", "PQ8x4": "", "IVF64,PQ8x4fs": "nprobe=1", "SQ4,RFlat": ""}


def build(kind: str, rows, search: str = "", *, min_recall: float = 0.0, **options):
    made = build_index(
        IndexSettings(kind=kind, search=search, min_recall=min_recall),
        rows,
        **{"recent_queries": recent(near(KEYS, 64, seed=9)), **options},
    )
    assert isinstance(made, ApproximateIndex)
    return made


def spread(allowed: torch.Tensor, share: float, seed: int) -> set[int]:
    """A share of these rows."""
    chosen = torch.rand(len(allowed), generator=torch.Generator().manual_seed(seed)) < share
    return set(allowed[chosen].tolist())


@pytest.fixture(scope="module")
def blocks():
    """One large block for each kind, indexed once, and a small one."""
    small = block_of(KEYS[LARGE:], segment="small")
    made = {}
    for kind, search in {**EVERYTHING, **LOSSY}.items():
        large = block_of(KEYS[:LARGE])
        build(kind, rows_of([(large, 0, LARGE)]), search)
        assert large.accelerator is not None
        made[kind] = large
    return made, small


@pytest.mark.parametrize("kind", EVERYTHING)
@given(
    seed=st.integers(0, 2**31),
    start=st.integers(0, 2_000),
    share=st.sampled_from([0.0, 0.001, 0.5, 0.99, 1.0]),
    hides_the_best=st.booleans(),
    k=st.integers(1, 60),
)
@settings(max_examples=12, deadline=None)
def test_answers_are_those_of_a_full_sort(blocks, kind, seed, start, share, hides_the_best, k):
    large, small = blocks[0][kind], blocks[1]
    generator = torch.Generator().manual_seed(seed)
    keys = torch.cat([KEYS[LARGE:], KEYS[start:LARGE]])
    ids = torch.randperm(len(keys), generator=generator) * 3
    docs = torch.arange(len(keys)) // 7
    queries = near(KEYS, 4, seed=seed)
    dead = spread(torch.arange(len(keys)), share, seed)
    if hides_the_best:  # a removed domain, say: the queries' whole neighbourhood
        dead |= set(by_full_sort(keys, queries[:2], 400)[0].flatten().tolist())
    best = by_full_sort(keys, queries, 1, dead=dead)[0][:, 0].clamp(min=0)
    exclude = torch.where(torch.arange(4) < 3, docs[best], -1)
    index = build(
        kind,
        rows_of([(small, 0, SMALL), (large, start, LARGE)], ids=ids, docs=docs, dead=dead),
        EVERYTHING[kind],
    )
    assert index.accelerated_rows == LARGE - start
    hits = index.search_approximately(queries, k, exclude)
    rows, scores = by_full_sort(keys, queries, k, ids=ids, docs=docs, dead=dead, exclude=exclude)
    assert torch.equal(hits.rows, rows)
    assert torch.equal(hits.scores, scores)


@pytest.mark.parametrize("kind", LOSSY)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.3, 0.999]),
    long_document=st.booleans(),
    k=st.sampled_from([1, 5, 200]),
)
@settings(max_examples=8, deadline=None)
def test_k_come_back_though_most_is_removed_or_excluded(
    blocks, kind, seed, share, long_document, k
):
    large, small = blocks[0][kind], blocks[1]
    keys = torch.cat([KEYS[:LARGE], KEYS[LARGE:]])
    docs = torch.arange(len(keys)) // (15_000 if long_document else 3)
    dead = spread(torch.arange(len(keys)), share, seed)
    queries = near(KEYS, 6, seed=seed)
    exclude = docs[by_full_sort(keys, queries, 1, dead=dead)[0][:, 0]]
    rows = rows_of([(large, 0, LARGE), (small, 0, SMALL)], docs=docs, dead=dead)
    index = build(kind, rows, LOSSY[kind])
    assert index.accelerated_rows == LARGE
    hits = index.search_approximately(queries, k, exclude)
    true_rows, _ = by_full_sort(keys, queries, k, docs=docs, dead=dead, exclude=exclude)
    assert torch.equal((hits.rows >= 0).sum(1), (true_rows >= 0).sum(1))
    for b, found in enumerate(hits.rows):
        real = found[found >= 0]
        assert len(set(real.tolist())) == len(real)
        assert not dead & set(real.tolist())
        assert not bool((docs[real] == exclude[b]).any())
        own = (keys[real].double() * queries[b].double()).sum(1).float()
        assert torch.equal(hits.scores[b, : len(real)], own)
        assert torch.equal(own.sort(descending=True).values, own)


def test_a_tie_goes_to_the_lower_id_in_a_large_block_and_beside_it():
    keys = KEYS.clone()
    keys[[7, 4_000, LARGE + 5]] = 9.0
    parts = [(block_of(keys[:LARGE]), 0, LARGE), (block_of(keys[LARGE:]), 0, SMALL)]
    ids = torch.arange(len(keys)).flip(0)
    index = build("IVF16,Flat", rows_of(parts, ids=ids), "nprobe=16")
    hits = index.search_approximately(torch.ones(1, WIDTH), 3, None)
    assert hits.rows.tolist() == [[LARGE + 5, 4_000, 7]]


def test_winners_of_a_rounded_index_are_scored_by_their_exact_keys():
    rounded = (KEYS * 4).round() / 4

    def exact_keys(rows):
        return KEYS[torch.from_numpy(rows)]

    parts = [(block_of(rounded[:LARGE]), 0, LARGE), (block_of(rounded[LARGE:]), 0, SMALL)]
    for block, _, _ in parts:
        block.codes = Rounded(block.codes)
    rows = rows_of(parts, exact_keys=exact_keys)
    assert not rows.keys.exact
    index = build("ivf", rows, "nprobe=64")
    queries = near(KEYS, 40)
    hits = index.search_approximately(queries, 5, None)
    own = (KEYS[hits.rows].double() * queries.double().unsqueeze(1)).sum(2).float()
    assert torch.equal(hits.scores, own)
    assert recall_at_k(hits.rows, by_full_sort(KEYS, queries, 5)[0]) > 0.9


class Rounded:
    """Codes that do not hold the very keys."""

    exact = False

    def __init__(self, codes):
        self._codes = codes

    def __getattr__(self, name):
        return getattr(self._codes, name)


def test_the_gate_follows_the_queries_and_every_answer_says_what_it_is():
    block = block_of(KEYS[:LARGE])
    rows = rows_of([(block, 0, LARGE)])
    good, strange = (
        near(KEYS, 64),
        5 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2)),
    )
    options = {"search": "nprobe=1", "min_recall": 0.8}
    unknown = build("IVF32,Flat", rows, recent_queries=None, **options)
    assert unknown.search(good, 5, None).exact
    assert "0 of 64" in unknown.gate.state.reason
    few = build("IVF32,Flat", rows, recent_queries=recent(good[:63]), **options)
    assert few.search(good, 5, None).exact
    opened = build("IVF32,Flat", rows, recent_queries=recent(good), **options)
    assert not opened.search(good, 5, None).exact
    assert opened.search(good, 5, None, exact=True).exact
    assert opened.gate.state.recall >= 0.8
    shut = build("IVF32,Flat", rows, recent_queries=recent(strange), **options)
    assert shut.gate.state.recall < 0.8
    hits = shut.search(strange, 5, None)
    assert hits.exact
    assert torch.equal(hits.rows, by_full_sort(KEYS[:LARGE], strange, 5)[0])
    assert not shut.search_approximately(strange, 5, None).exact


def test_small_blocks_and_those_of_one_epoch_alone_are_searched_exactly():
    for block in (block_of(KEYS[:500]), block_of(KEYS, segment=None)):
        index = build("ivf", rows_of([(block, 0, block.rows)]))
        assert index.accelerated_rows == 0
        assert block.accelerator is None
        assert index.search(near(KEYS, 3), 5, None).exact
        assert "no segment" in index.gate.state.reason


def test_an_edit_shares_what_was_built_and_goes_on_with_the_gate():
    large, small = block_of(KEYS[:LARGE]), block_of(KEYS[LARGE:], segment="added")
    first = build("ivf", rows_of([(large, 0, LARGE)]))
    built = large.accelerator
    rows = rows_of([(large, 0, LARGE), (small, 0, SMALL)], dead=[3])
    edited = build("ivf", rows, previous=first, recent_queries=None)
    assert large.accelerator is built
    assert edited.gate.state == first.gate.state
    fresh = build("ivf", rows, recent_queries=None)
    assert not fresh.gate.state.open


def test_trained_parts_outlive_a_refresh_and_not_a_change_of_the_keys():
    generator = torch.Generator().manual_seed(4)
    drifted = KEYS + 0.05 * torch.randn(KEYS.shape, generator=generator)
    scrambled = drifted[torch.randperm(len(KEYS), generator=generator)]
    for kind in ("ivf", "pq", "RR16,IVF64,SQ8"):
        old = block_of(KEYS)
        first = build(kind, rows_of([(old, 0, len(KEYS))]), recent_queries=None)
        assert old.accelerator.trained_anew
        new = block_of(drifted)
        queries = near(drifted, 64)
        second = build(
            kind,
            rows_of([(new, 0, len(KEYS))]),
            previous=first,
            recent_queries=recent(queries),
        )
        assert not new.accelerator.trained_anew
        true_rows, _ = by_full_sort(drifted, queries, 5)
        hits = second.search_approximately(queries, 5, None)
        anew = build(kind, rows_of([(block_of(drifted), 0, len(KEYS))]))
        afresh = anew.search_approximately(queries, 5, None)
        assert recall_at_k(hits.rows, true_rows) >= recall_at_k(afresh.rows, true_rows) - 0.03
    block = block_of(scrambled)  # no row is where its list says
    lists = build("ivf", rows_of([(old := block_of(KEYS), 0, len(KEYS))]))
    build("ivf", rows_of([(block, 0, len(KEYS))]), previous=lists)
    assert block.accelerator.trained_anew
    assert not torch.equal(
        torch.from_numpy(block.accelerator.lists_n), torch.from_numpy(old.accelerator.lists_n)
    )


def test_rows_keep_their_lists_by_their_place_in_the_segment():
    old = block_of(KEYS[:LARGE])
    first = build("ivf", rows_of([(old, 0, LARGE)]))
    moved = block_of(KEYS[1_000:], first=1_000)  # the segment's rows, dealt otherwise
    build("ivf", rows_of([(moved, 0, moved.rows)]), previous=first)
    assert not moved.accelerator.trained_anew
    kept = moved.accelerator.lists_n[: LARGE - 1_000]
    assert (kept == old.accelerator.lists_n[1_000:]).all()
    other = block_of(KEYS[1_000:], segment="other")  # takes the centroids alone
    build("ivf", rows_of([(other, 0, other.rows)]), previous=first)
    assert not other.accelerator.trained_anew


def test_kept_parts_are_trained_anew_when_they_no_longer_find_enough():
    old = block_of(KEYS)
    rows = rows_of([(old, 0, len(KEYS))])
    first = build("IVF32,Flat", rows, "nprobe=1", min_recall=0.8)
    assert first.gate.state.open
    new = block_of(KEYS)
    kind = IndexSettings(kind="IVF32,Flat", search="nprobe=1", min_recall=0.8)
    strange = recent(5 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2)))
    build_index(kind, rows_of([(new, 0, len(KEYS))]), previous=first, recent_queries=strange)
    assert new.accelerator.trained_anew


def test_long_work_is_given_up_when_nobody_wants_it():
    class NotWanted(Exception):
        pass

    def check():
        raise NotWanted

    block = block_of(KEYS)
    with pytest.raises(NotWanted):
        build("ivf", rows_of([(block, 0, len(KEYS))]), check=check)
    assert block.accelerator is None


def test_faiss_takes_the_threads_of_torch_and_leaves_those_of_others_alone(blocks):
    seen = {}
    before = faiss.omp_get_max_threads()
    index = build("ivf", rows_of([(blocks[0]["ivf"], 0, LARGE)]), "nprobe=1")

    def elsewhere():
        faiss.omp_set_num_threads(3)
        index.search_approximately(near(KEYS, 2), 5, None)
        seen["elsewhere"] = faiss.omp_get_max_threads()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == {"elsewhere": 3}
    assert faiss.omp_get_max_threads() == before


def test_searches_side_by_side_answer_as_one_after_the_other(blocks):
    rows = rows_of([(blocks[0]["ivf"], 0, LARGE), (blocks[1], 0, SMALL)], dead=range(0, LARGE, 3))
    index = build("ivf", rows, "nprobe=1")
    batches = [near(KEYS, 16, seed=seed) for seed in range(8)]
    alone = [index.search_approximately(queries, 5, None) for queries in batches]
    together: dict[int, object] = {}

    def search(at: int) -> None:
        for _ in range(5):
            together[at] = index.search_approximately(batches[at], 5, None)

    threads = [threading.Thread(target=search, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, hits in enumerate(alone):
        assert torch.equal(together[at].rows, hits.rows)


@pytest.mark.parametrize(
    ("kind", "search", "words"),
    [
        ("annoy", "", "could not parse.*allowed: flat"),
        ("LSH", "", "METRIC_L2"),
        ("L2norm,IVF64,Flat", "", "NormalizationTransform normalises or centres"),
        ("PCA8,IVF64,Flat", "", "PCAMatrix normalises or centres"),
        ("IDMap,Flat", "", "leave IDMap out"),
        ("PQ5", "", "multiple of the number of subquantizers"),
        ("IVF64,Flat", "efSearch=9", "could not set parameter efSearch"),
        ("IVF64,Flat", "nprobe=0", "'0' is no whole number"),
        ("IVF64,Flat", "nprobe", "does not suit"),
        ("ivf", "nprobe=2.5", "'2.5' is no whole number"),
        ("flat", "nprobe=2", "has no search parameters"),
    ],
)
def test_an_index_that_cannot_be_built_is_refused_beforehand(kind, search, words):
    with pytest.raises(ValueError, match=words):
        check_index(IndexSettings(kind=kind, search=search), key_width=WIDTH)


def test_a_gpu_without_a_faiss_for_it_is_refused():
    with pytest.raises(ValueError, match="needs a FAISS that sees this GPU"):
        check_index(IndexSettings(kind="ivf"), device="cuda:99")


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "HNSW32", "OPQ8_16,IVF64,PQ8", "SQ8"])
def test_good_settings_pass_with_and_without_a_known_width(kind):
    check_index(IndexSettings(kind=kind))
    check_index(IndexSettings(kind=kind), key_width=WIDTH)


@pytest.mark.parametrize("kind", ["ivf", "pq", "HNSW16", "IVF64,Flat"])
def test_bytes_are_counted_and_foreseen(kind):
    block = block_of(KEYS)
    index = build(kind, rows_of([(block, 0, len(KEYS))]), recent_queries=None)
    flat = dataclasses.replace(IndexSettings(), kind="flat")
    beside = build_index(flat, rows_of([(block, 0, len(KEYS))])).bytes
    held = len(faiss.serialize_index(block.accelerator._index))
    assert held * 0.9 < index.bytes - beside < held * 1.6
    foreseen = expected_index_bytes(IndexSettings(kind=kind), rows=len(KEYS), width=WIDTH)
    assert held * 0.6 < foreseen < held * 1.4
    free = expected_index_bytes(IndexSettings(kind=kind), rows=10, width=WIDTH, with_room=True)
    assert free == 0, "so few rows are not indexed"
    room = expected_index_bytes(
        IndexSettings(kind=kind), rows=len(KEYS), width=WIDTH, with_room=True
    )
    assert room > foreseen if kind == "pq" else room == foreseen


def test_what_training_takes_is_foreseen():
    many = {"rows": 10**6, "width": WIDTH}
    assert training_bytes(IndexSettings(kind="flat"), **many) == 0
    assert training_bytes(IndexSettings(kind="ivf"), rows=SMALLEST_BLOCK - 1, width=WIDTH) == 0
    sample = training_bytes(IndexSettings(kind="ivf"), **many)
    assert sample == 2 * 4 * WIDTH * 48 * 4096
    given = training_bytes(IndexSettings(kind="ivf", train_rows=5000), **many)
    assert given == 2 * 4 * WIDTH * 5000
