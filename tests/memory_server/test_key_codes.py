"""Keys held as fewer bytes: what is lost, what it is known to be, and what a search makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_server.index.base import IndexInput
from memory_server.index.flat_index import FlatIndex
from memory_server.index.search_queries import SearchQueries
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes

REDUCED = ["float16", "bfloat16", "int8"]
CPU = torch.device("cpu")
# Half a step of the last place of a number of the row's largest size.
LARGEST_LOSS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 254}


class CountingKeys:
    """Gives exact keys as a shard does, and remembers for which rows."""

    def __init__(self, keys):
        self.keys, self.asked = keys, []

    def __call__(self, rows):
        assert rows.dtype == np.int64
        assert len(np.unique(rows)) == len(rows)
        self.asked.append(rows)
        return self.keys[torch.from_numpy(rows)]


def coded(keys, dtype):
    codes = KeyCodes.empty(len(keys), keys.shape[1], dtype, CPU)
    step = max(1, len(keys) // 7)
    for start in range(0, len(keys), step):
        codes.put(start, keys[start : start + step])
    return codes


def coded_index(keys, dtype, *, exact_keys=None, tail=0, docs=None, dead=()):
    """An index over blocks of codes and, at the end, a tail of exact keys."""
    count, norm = len(keys), float(keys.norm(dim=1).max())
    cuts = [0, count // 3, count - tail]
    parts = []
    for start, stop in [(cuts[0], cuts[1]), (cuts[1], cuts[2])]:
        block = KeyBlock(codes=coded(keys[start:stop], dtype), largest_norm=norm, checksum=0)
        parts.append((block, 0, stop - start))
    parts.append(
        (KeyBlock(codes=KeyCodes(keys[cuts[2] :]), largest_norm=norm, checksum=0), 0, tail)
    )
    return FlatIndex(
        IndexInput(
            keys=BlockedKeys(parts, keys.shape[1], CPU),
            ids_N=torch.arange(count) * 3,
            doc_ids_N=torch.arange(count) if docs is None else docs,
            dead_rows=torch.tensor(sorted(dead), dtype=torch.int64),
            exact_keys=CountingKeys(keys) if exact_keys is None else exact_keys,
        )
    )


def clustered(rows, width, *, clusters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    nearest = torch.randint(clusters, (rows,), generator=generator)
    return centres[nearest] + 0.5 * torch.randn(rows, width, generator=generator)


def best_by_full_sort(keys, queries, k):
    return (
        (queries.double() @ keys.double().T)
        .float()
        .sort(dim=1, descending=True, stable=True)[1][:, :k]
    )


@pytest.mark.parametrize("dtype", REDUCED)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 130),
    sizes=st.lists(st.integers(-140, 126), min_size=1, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_close_and_how_close_is_known(dtype, seed, width, sizes):
    """Rows of very different sizes, from denormal numbers to the largest that float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(len(sizes), width, generator=generator) * 2 - 1
    keys = torch.ldexp(rows, torch.tensor(sizes).unsqueeze(1))
    keys[0] = 0
    codes = coded(keys, dtype)
    back = codes.gather(torch.arange(len(keys))).double()
    largest = keys.abs().amax(dim=1, keepdim=True).double()
    allowed = largest * LARGEST_LOSS[dtype] * (1 + 1e-6) + 2.0**-100
    assert bool(((keys.double() - back).abs() <= allowed).all())
    distance = (keys.double() - back).norm(dim=1)
    told = codes.errors(torch.arange(len(keys))).double()
    assert bool((distance <= told).all())
    rounding = 2.0**-20 * (keys.double().norm(dim=1) + largest[:, 0]) + 2.0**-100
    assert bool((told <= distance * 1.01 + rounding).all())
    assert codes.largest_error >= float(told.max())


@pytest.mark.parametrize(("dtype", "most"), [("int8", 136), ("float16", 264), ("bfloat16", 264)])
def test_bytes_per_entry(dtype, most):
    codes = KeyCodes.empty(1000, 128, dtype, CPU)
    assert codes.nbytes <= 1000 * most
    assert codes.view(0, 10).nbytes <= 10 * most
    assert not codes.exact


@pytest.mark.parametrize("dtype", REDUCED)
def test_nan_and_infinity_are_refused_with_the_row(dtype):
    for bad in (float("nan"), float("inf"), -float("inf")):
        keys = torch.ones(5, 4)
        keys[3, 1] = bad
        with pytest.raises(ValueError, match="row 13 has NaN or infinity"):
            KeyCodes.empty(20, 4, dtype, CPU).put(10, keys)


@pytest.mark.parametrize("dtype", ["float32", *REDUCED])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_products_are_within_what_they_say(dtype, batch):
    torch.manual_seed(0)
    keys, queries = clustered(9_000, 40, clusters=9), torch.randn(batch, 40)
    queries[0] = 0
    codes, search = coded(keys, dtype), SearchQueries(queries)
    scores, units = codes.products(search, 5, 8_800)
    scores = scores.double() if units is None else scores.double() * units
    norm = float(keys.norm(dim=1).max())
    allowed = codes.product_error(search, norm).double() + 1e-5 * norm * search.norms.double()
    exact = keys[5:8_800].double() @ queries.double().T
    assert bool(((scores - exact).abs() <= allowed).all())


def test_what_the_queries_lose_counts_too():
    """A key without an error of its own, in the direction of what int8 loses of the query."""
    query = torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    query[0, 0] = 1
    search = SearchQueries(query)
    whole, units, _ = search.int8
    lost = query - whole * units
    keys = (lost / lost.abs().max() * 127).round().repeat(3, 1)
    codes = coded(keys, "int8")
    scores, units = codes.products(search, 0, 3)
    scores = scores if units is None else scores * units
    wrong = (scores.double() - keys.double() @ query.double().T).abs()
    norm = float(keys.norm(dim=1).max())
    told = codes.product_error(search, norm).double()
    assert bool((wrong <= told + 1e-5 * norm * search.norms).all())


@pytest.mark.parametrize(("equal", "certified"), [(100, True), (1_000, False)])
@pytest.mark.parametrize("dtype", REDUCED)
def test_a_query_with_many_equal_keys_is_looked_at_again(dtype, equal, certified):
    torch.manual_seed(0)
    keys = clustered(6_000, 32, clusters=20)
    keys[1_500 : 1_500 + equal] = keys[1_500]
    queries = torch.randn(40, 32)
    queries[7] = 3 * keys[1_500]
    expected = best_by_full_sort(keys, queries, 5)
    index = coded_index(keys, dtype)
    hits = index.search(queries, 5, None)
    assert hits.exact == certified
    for reply in (hits, index.search(queries, 5, None, exact=True)):
        if reply.exact:
            assert torch.equal(reply.rows, expected)
    assert reply.exact


@pytest.mark.parametrize("dtype", REDUCED)
def test_finds_and_scores_what_exact_keys_would(dtype):
    torch.manual_seed(0)
    keys = clustered(20_000, 64, clusters=40)
    keys[100] = keys[15_000]  # a tie, between two blocks
    for queries in (keys[:80] + 0.2 * torch.randn(80, 64), torch.randn(80, 64)):
        given_keys = CountingKeys(keys)
        hits = coded_index(keys, dtype, exact_keys=given_keys, tail=500).search(queries, 5, None)
        expected = best_by_full_sort(keys, queries, 5)
        recall = (hits.rows.unsqueeze(2) == expected.unsqueeze(1)).any(2).double().mean()
        assert recall >= 0.99
        if hits.exact:
            assert torch.equal(hits.rows, expected)
        true_scores = torch.einsum("bkq,bq->bk", keys[hits.rows].double(), queries.double())
        torch.testing.assert_close(hits.scores, true_scores.float(), rtol=1e-6, atol=1e-6)
        assert sum(map(len, given_keys.asked)) <= 30 * len(queries)
        assert all(int(rows.max()) < 19_500 for rows in given_keys.asked)  # the tail is held


@given(seed=st.integers(0, 2**31), k=st.integers(1, 70), rows=st.integers(3, 400))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("dtype", REDUCED)
def test_exact_on_request_equals_a_search_by_exact_keys(dtype, seed, k, rows):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-2, 3, (rows, 6), generator=generator).float() / 3  # many ties
    queries = torch.randint(-2, 3, (4, 6), generator=generator).float()
    docs = torch.randint(0, 9, (rows,), generator=generator)
    exclude = torch.randint(-1, 9, (4,), generator=generator)
    dead = torch.randperm(rows, generator=generator)[: rows // 4].tolist()
    index = coded_index(keys, dtype, tail=rows // 5, docs=docs, dead=dead)
    hits = index.search(queries, k, exclude, exact=True)
    whole = BlockedKeys(
        [(KeyBlock(codes=KeyCodes(keys), largest_norm=2.0, checksum=0), 0, rows)], 6, CPU
    )
    expected = FlatIndex(
        IndexInput(
            keys=whole,
            ids_N=torch.arange(rows) * 3,
            doc_ids_N=docs,
            dead_rows=torch.tensor(sorted(dead), dtype=torch.int64),
        )
    ).search(queries, k, exclude)
    assert hits.exact
    assert torch.equal(hits.rows, expected.rows)
    assert torch.equal(hits.scores, expected.scores)


def test_what_cannot_be_certified_says_so():
    keys = torch.ones(6_000, 16) * 0.3
    hits = coded_index(keys, "int8").search(torch.ones(2, 16), 3, None)
    assert not hits.exact
    assert bool((hits.rows >= 0).all())


def test_codes_need_exact_keys():
    keys = torch.randn(10, 4)
    block = KeyBlock(codes=coded(keys, "int8"), largest_norm=9.0, checksum=0)
    with pytest.raises(ValueError, match="exact_keys"):
        FlatIndex(
            IndexInput(
                keys=BlockedKeys([(block, 0, 10)], 4, CPU),
                ids_N=torch.arange(10),
                doc_ids_N=torch.arange(10),
                dead_rows=torch.empty(0, dtype=torch.int64),
            )
        )
