"""How much an approximate search looks at: the least that was measured to be enough."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_server.index.base import IndexSettings
from memory_server.index.coarse_lists import CoarseLists
from memory_server.index.faiss_presets import recipe_for
from memory_server.index.faiss_products import inner_products_at
from memory_server.index.recall_gate import MIN_QUERIES
from memory_server.index.search_effort import (
    CANDIDATE_STEPS,
    Effort,
    Recall,
    aim_for,
    least_effort,
    list_steps,
    tuning_and_judging,
)
from tests.keys_in_blocks import recent

MOST = Effort(lists=256, candidates_per_hit=32)


def cost(effort: Effort) -> float:
    assert effort.lists is not None
    return effort.lists * 10 + effort.candidates_per_hit


def lossless(mean: float) -> Recall:
    return Recall(mean=mean, error=0.0)


@given(lists=st.integers(1, 256), candidates=st.sampled_from(CANDIDATE_STEPS[:6]))
def test_the_least_of_both_that_is_needed_is_found_by_few_measurements(
    lists: int, candidates: int
) -> None:
    measured = []

    def measure(effort: Effort) -> Recall:
        measured.append(effort)
        assert effort.lists is not None
        return lossless(float(effort.lists >= lists and effort.candidates_per_hit >= candidates))

    found = least_effort(measure, most=MOST, aim=0.99, cost=cost)
    assert found.lists == min(n for n in list_steps(256) if n >= lists)
    assert found.candidates_per_hit == candidates
    assert len(measured) == len(set(measured)) <= 10


def test_more_lists_are_taken_where_they_save_candidates() -> None:
    """8 lists reach the aim with all candidates, 64 with one: what is cheaper decides."""

    def measure(effort: Effort) -> Recall:
        assert effort.lists is not None
        if effort.lists >= 64:
            return lossless(1.0)
        return lossless(0.991 if effort.lists >= 8 and effort.candidates_per_hit >= 32 else 0.5)

    few_lists = least_effort(measure, most=MOST, aim=0.99, cost=cost)
    assert few_lists == Effort(lists=8, candidates_per_hit=32)
    few_candidates = least_effort(
        measure, most=MOST, aim=0.99, cost=lambda effort: effort.candidates_per_hit
    )
    assert few_candidates == Effort(lists=64, candidates_per_hit=1)


def test_the_most_is_taken_where_nothing_is_enough() -> None:
    assert least_effort(lambda _: lossless(0.5), most=MOST, aim=0.99, cost=cost) == MOST


def test_a_recall_counts_by_what_it_may_be_off() -> None:
    true = torch.tensor([[1, 2], [3, 4], [5, -1], [-1, -1]])
    found = torch.tensor([[2, 1], [3, 9], [5, 7], [0, 0]])
    recall = Recall.of(found, true)
    shares = [1.0, 0.5, 1.0]  # the last query has no entry that could be found
    mean = sum(shares) / 3
    spread = math.sqrt(sum((one - mean) ** 2 for one in shares) / 3)
    assert recall.mean == pytest.approx(mean)
    assert recall.error == pytest.approx(spread / math.sqrt(3))
    assert recall.reaches(mean - 1.01 * recall.error)
    assert not recall.reaches(mean - 0.99 * recall.error)
    assert Recall.of(found[3:], true[3:]) == lossless(1.0)


def test_the_aim_lies_above_what_is_still_served() -> None:
    assert aim_for(0.9) == 0.99
    assert aim_for(0.99) == pytest.approx(0.995)
    assert aim_for(1.0) == 1.0


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16, 100])
def test_steps_rise_to_the_most(most: int) -> None:
    steps = list_steps(most)
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-1] == most


def test_an_effort_is_not_judged_by_the_queries_that_chose_it_if_there_are_others() -> None:
    queries = torch.arange(1000.0).unsqueeze(1)
    by, judges = tuning_and_judging(recent(queries))
    assert judges.count == MIN_QUERIES
    assert by.count >= MIN_QUERIES
    assert not set(by.queries_nQ.flatten().tolist()) & set(judges.queries_nQ.flatten().tolist())
    by, judges = tuning_and_judging(recent(queries[: 2 * MIN_QUERIES - 1]))
    assert by.count == judges.count == MIN_QUERIES


@given(
    lists=st.sampled_from([1, 7, 1024, 1040, 2048, 4096, 4100]),
    wanted=st.integers(1, 64),
    rows=st.integers(1, 5),
    equal=st.booleans(),
)
def test_the_nearest_lists_are_those_of_a_full_sort(
    lists: int, wanted: int, rows: int, equal: bool
) -> None:
    generator = torch.Generator().manual_seed(lists + wanted)
    centroids_LQ = torch.randn(lists, 8, generator=generator)
    if equal:
        centroids_LQ = centroids_LQ.round()  # many equal products
    queries_BQ = torch.randn(rows, 8, generator=generator).round()
    wanted = min(wanted, lists)
    found, products = CoarseLists(centroids_LQ).nearest(queries_BQ, wanted)
    every = queries_BQ @ centroids_LQ.T
    assert torch.equal(products, every.topk(wanted, dim=1).values)
    assert torch.equal(every.gather(1, found), products)
    assert all(len(set(row)) == wanted for row in found.tolist())


def test_products_with_keys_anywhere_are_those_of_gathered_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    keys_NQ = torch.randn(500, 24, generator=generator)
    queries_BQ = torch.randn(6, 24, generator=generator)
    rows_BM = torch.randint(-1, 500, (6, 40), generator=generator)
    products = inner_products_at(queries_BQ, keys_NQ, rows_BM)
    expected = torch.bmm(keys_NQ[rows_BM.clamp(min=0)], queries_BQ.unsqueeze(2)).squeeze(2)
    real = rows_BM >= 0
    torch.testing.assert_close(products[real], expected[real])
    assert bool((products[~real] == float("-inf")).all())


def test_search_parameters_of_the_user_are_not_measured_away() -> None:
    given_by_user = recipe_for(IndexSettings(kind="ivf", search="nprobe=3"), rows=10**6, width=128)
    assert (given_by_user.most_lists, given_by_user.effort.lists) == (0, None)
    measured = recipe_for(IndexSettings(kind="ivf"), rows=10**6, width=128)
    assert measured.most_lists > 1
    assert recipe_for(IndexSettings(kind="HNSW32"), rows=10**6, width=128).most_lists == 0
    large = recipe_for(IndexSettings(kind="IVF64k_HNSW32,PQ16"), rows=10**7, width=128)
    assert large.lists == 65536
