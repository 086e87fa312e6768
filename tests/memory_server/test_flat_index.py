"""Exact search against a full float64 sort: ties, pads, removed rows, excluded documents."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_server.index.base import IndexInput
from memory_server.index.flat_index import QUERY_BLOCK, FlatIndex, exact_inner_products
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes


def blocked(keys, cuts=()):
    """Keys in blocks that end at the cuts; each block holds a row more at either end."""
    edges = [0, *sorted(cuts), len(keys)]
    parts = []
    for start, stop in pairwise(edges):
        wider = torch.cat([keys.new_full((1, keys.shape[1]), 1e6), keys[start:stop]])
        wider = torch.cat([wider, wider[:1]])
        norm = float(keys.norm(dim=1).max()) if len(keys) else 0.0
        block = KeyBlock(codes=KeyCodes(wider), largest_norm=norm, checksum=0)
        parts.append((block, 1, 1 + stop - start))
    return BlockedKeys(parts, keys.shape[1], keys.device)


def make_index(keys, ids=None, docs=None, dead=(), cuts=()):
    count = len(keys)
    return FlatIndex(
        IndexInput(
            keys=blocked(keys, cuts),
            ids_N=torch.arange(count) if ids is None else ids,
            doc_ids_N=torch.arange(count) if docs is None else docs,
            dead_rows=torch.tensor(sorted(dead), dtype=torch.int64),
        )
    )


def by_full_sort(keys, queries, k, ids, docs, dead=(), exclude=None):
    """The same answer by the plainest means: python tuples, sorted."""
    reply = []
    for b, query in enumerate(queries.double()):
        scores = (keys.double() * query).sum(1).float().tolist()
        rows = [
            row
            for row in range(len(keys))
            if row not in dead and (exclude is None or int(docs[row]) != int(exclude[b]))
        ]
        rows.sort(key=lambda row: (-scores[row], int(ids[row])))
        reply.append([*rows[:k], *[-1] * (k - len(rows))])
    return reply


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 300),
    batch=st.integers(1, 5),
    k=st.integers(1, 70),
    distinct=st.integers(1, 12),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_full_sort_even_when_most_keys_are_equal(seed, rows, batch, k, distinct, cuts):
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randint(-2, 3, (distinct, 6), generator=generator).float()
    keys = palette[torch.randint(0, distinct, (rows,), generator=generator)]
    queries = torch.randint(-2, 3, (batch, 6), generator=generator).float()
    ids = torch.randperm(rows, generator=generator) * 7
    docs = torch.randint(0, 9, (rows,), generator=generator)
    exclude = torch.randint(-1, 9, (batch,), generator=generator)
    dead = set(torch.randperm(rows, generator=generator)[: rows // 4].tolist())
    index = make_index(keys, ids, docs, dead, cuts=[int(cut * rows) for cut in cuts])
    hits = index.search(queries, k, exclude)
    assert hits.rows.tolist() == by_full_sort(keys, queries, k, ids, docs, dead, exclude)
    assert torch.equal(hits.scores == float("-inf"), hits.rows == -1)


def test_equals_a_full_sort_over_many_blocks():
    torch.manual_seed(0)
    keys, queries = torch.randn(20_011, 32), torch.randn(QUERY_BLOCK + 3, 32)
    ids = torch.arange(20_011)
    hits = make_index(keys).search(queries, 7, None)
    some = [0, 1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 2]
    assert hits.rows[some].tolist() == by_full_sort(keys, queries[some], 7, ids, ids)


@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 3_000), max_size=40),
    k=st.integers(1, 12),
)
@settings(max_examples=30, deadline=None)
def test_any_cut_into_blocks_gives_the_same_bits(seed, cuts, k):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(3_000, 24, generator=generator)
    keys[torch.randint(0, 3_000, (300,), generator=generator)] = keys[:300].clone()  # ties
    queries = torch.randn(9, 24, generator=generator)
    docs = torch.randint(0, 50, (3_000,), generator=generator)
    exclude = torch.randint(-1, 50, (9,), generator=generator)
    dead = torch.randint(0, 3_000, (60,), generator=generator).unique().tolist()
    whole = make_index(keys, docs=docs, dead=dead).search(queries, k, exclude)
    hits = make_index(keys, docs=docs, dead=dead, cuts=cuts).search(queries, k, exclude)
    assert torch.equal(hits.rows, whole.rows)
    assert torch.equal(hits.scores, whole.scores)


def test_one_long_document_is_excluded_row_by_row_or_by_whole_blocks_alike():
    torch.manual_seed(1)
    keys, docs = torch.randn(9_000, 8), torch.zeros(9_000, dtype=torch.int64)
    docs[8_990:] = 1
    few, many = torch.randn(3, 8), torch.randn(200, 8)  # 200 x 8990 cells are too many to name
    many[:3] = few
    exclude_few, exclude_many = torch.tensor([0, 1, -1]), torch.zeros(200, dtype=torch.int64)
    exclude_many[:3] = exclude_few
    index = make_index(keys, docs=docs)
    hits_few, hits_many = index.search(few, 4, exclude_few), index.search(many, 4, exclude_many)
    assert torch.equal(hits_few.rows, hits_many.rows[:3])
    assert bool((hits_few.rows[0] >= 8_990).all())
    assert bool((hits_few.rows[1] < 8_990).all())


def test_collapsed_keys_go_to_the_lowest_ids():
    keys = torch.ones(5_000, 16) * 0.3
    ids = torch.arange(5_000).flip(0) + 11
    hits = make_index(keys, ids).search(torch.randn(4, 16), 3, None)
    assert hits.rows.tolist() == [[4999, 4998, 4997]] * 4


def test_scores_do_not_depend_on_the_neighbours():
    torch.manual_seed(2)
    keys, queries = torch.randn(4_000, 128), torch.randn(40, 128)
    whole = make_index(keys).search(queries, 5, None)
    alone: list[Tensor] = []
    for b in range(40):
        rows = whole.rows[b]
        alone.append(make_index(keys[rows], ids=rows).search(queries[b : b + 1], 5, None).scores)
    assert torch.equal(torch.cat(alone), whole.scores)


def test_reduced_precision_products_change_no_answer():
    torch.manual_seed(3)
    keys, queries = torch.randn(3_000, 64), torch.randn(8, 64)
    index = make_index(keys)
    exact = index.search(queries, 5, None)
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = index.search(queries, 5, None)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact.rows, reduced.rows)
    assert torch.equal(exact.scores, reduced.scores)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 128, 129])
def test_exact_inner_products_are_inner_products(width):
    queries, keys = torch.randn(3, width), torch.randn(3, 4, width)
    expected = torch.einsum("bq,bmq->bm", queries.double(), keys.double()).float()
    torch.testing.assert_close(exact_inner_products(queries, keys), expected)


def test_no_queries_and_no_rows():
    assert make_index(torch.randn(5, 4)).search(torch.empty(0, 4), 2, None).rows.shape == (0, 2)
    hits = make_index(torch.empty(0, 4)).search(torch.randn(2, 4), 2, None)
    assert hits.rows.tolist() == [[-1, -1], [-1, -1]]
