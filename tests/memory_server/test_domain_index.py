"""A shard that holds all domains searches some of them as if it held nothing else."""

import itertools
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memory_server.errors import BadMessage, UnknownDomain
from memory_server.index.base import IndexSettings
from memory_server.local import LocalMemory
from memory_server.replies import merge_replies
from memory_server.shard.domain_index import SETS_KEPT
from memory_server.shard.shard import Shard
from memory_server.store.store import Store
from memory_server.wire.joined_requests import Waiting, take_joinable
from memory_server.wire.messages import pack_ids, unpack_ids
from memory_server.wire.search_messages import SearchRequest, pack_search, unpack_search
from tests.memory_server.support_search import stage
from tests.memory_server.test_search_queue import waiting
from tests.toy_memory import (
    KEY_WIDTH,
    ToyEntry,
    empty_store,
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_weights,
    write_toy_segment,
)

# Blocks of their own, and segments that share one, in turns.
SEGMENTS = (
    ("a", toy_entries(range(0, 1500))),
    ("b", toy_entries(range(2000, 2010))),
    ("a", toy_entries(range(2010, 2020))),
    ("c", toy_entries(range(3000, 4200))),
    ("b", toy_entries(range(5000, 5040))),
    ("c", toy_entries(range(6000, 6005))),
)
REMOVED = [3, 2001, 2012, 3333, 6004]
CHOSEN = [c for n in (1, 2, 3) for c in itertools.combinations("abc", n)]


def of(domains: tuple[str, ...]) -> list[ToyEntry]:
    return [e for name, es in SEGMENTS if name in domains for e in es if e.id not in REMOVED]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = empty_store(tmp_path_factory.mktemp("shards") / "s")
    for number, (domain, entries) in enumerate(SEGMENTS):
        segment = write_toy_segment(store, f"s{number}", entries)
        store.commit(add_segments=[segment], domain=domain, message=domain)
    store.commit(remove_ids=REMOVED, message="some rows are gone")
    return store


def held(store: Store, *, shards: int = 1, shard: int = 0, index: str | IndexSettings) -> Shard:
    made = Shard(store.path, shards=shards, shard=shard, encoder=toy_factory, index=index)
    stage(made, 1, store.head())
    made.activate(1)
    return made


def floats(rows: int) -> Tensor:
    return torch.randn(rows, KEY_WIDTH, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_answers_are_bit_for_bit_those_of_a_memory_of_these_domains(
    store: Store, dtype: str
) -> None:
    index = IndexSettings(key_dtype=dtype)  # type: ignore[arg-type]
    made = [held(store, shards=2, shard=n, index=index) for n in range(2)]
    exclude = torch.tensor([1100, 5, -1, 1667, 0, 1, 2, 670])
    for domains in CHOSEN:
        with LocalMemory(
            store, encoder=toy_factory, weights=toy_weights(1), domains=domains, index=index
        ) as reference:
            for queries, excluded in itertools.product(
                (toy_queries(8), floats(8)), (None, exclude)
            ):
                replies = [
                    shard.search(queries, 60, excluded, exact=True, domains=domains)
                    for shard in made
                ]
                given = merge_replies(replies, 60, device=queries.device)
                wanted = reference.search(queries, 60, exclude_doc_ids=excluded, exact=True)
                for name in ("ids", "scores", "doc_ids", "tokens"):
                    assert torch.equal(getattr(given, name), getattr(wanted, name)), name
                assert given.exact
    for shard in made:
        shard.close()


def test_an_approximate_index_searches_domains_exactly(store: Store) -> None:
    pytest.importorskip("faiss")
    index = IndexSettings(kind="IVF8,Flat", search="nprobe=1", min_recall=0.0)
    shard = held(store, index=index)
    queries = toy_queries(8)
    reply = shard.search(queries, 5, domains=("c",))
    assert reply.ids.tolist() == expected_ids(of(("c",)), toy_weights(1), queries, 5)
    assert reply.exact
    # What is asked of domains is not what the index must be good at.
    assert shard.queries.recent() is None
    shard.search(queries, 5)
    assert shard.queries.recent() is not None
    shard.close()


def test_more_sets_than_are_kept_are_still_answered_and_whole_searches_as_before(
    store: Store,
) -> None:
    shard = held(store, index="flat")
    queries = toy_queries(3)
    before = shard.search(queries, 4)
    sets = [*CHOSEN, ("b", "a"), ("a", "a"), *CHOSEN]
    assert len(CHOSEN) < SETS_KEPT < len(sets)
    for domains in sets:
        reply = shard.search(queries, 4, domains=domains)
        assert reply.ids.tolist() == expected_ids(of(domains), toy_weights(1), queries, 4)
    assert shard.search(queries, 4).ids.tolist() == before.ids.tolist()
    assert [e.id for e in shard.entries([5, 2005, 3005], domains=("b", "c"))] == [2005, 3005]
    for ask in (
        lambda: shard.search(queries, 4, domains=("a", "z")),
        lambda: shard.entries([5], domains=("a", "z")),
    ):
        with pytest.raises(UnknownDomain, match=r"has no domain 'z'; it has a, b, c$"):
            ask()
    shard.close()


def test_a_shard_without_a_row_of_a_domain_answers_with_pads(tmp_path: Path) -> None:
    store = empty_store(tmp_path / "s")
    for name, entries in (("a", toy_entries(range(30))), ("b", toy_entries([90]))):
        segment = write_toy_segment(store, name, entries)
        store.commit(add_segments=[segment], domain=name, message=name)
    replies = []
    for number in range(3):
        shard = held(store, shards=3, shard=number, index="flat")
        replies.append(shard.search(toy_queries(2), 2, domains=("b",)))
        shard.close()
    assert sorted(reply.ids.tolist() for reply in replies) == [[[-1, -1]] * 2] * 2 + [
        [[90, -1]] * 2
    ]


NAMES = st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=5)


@given(NAMES, st.integers(0, 4), st.booleans(), st.sampled_from(["float16", "float32"]))
def test_domains_travel(names: list[str], rows: int, excludes: bool, travelling: str) -> None:
    request = SearchRequest(
        queries=toy_queries(rows).numpy(),
        k=5,
        exclude_doc_ids=np.arange(rows) if excludes else None,
        exact=True,
        domains=tuple(names),
    )
    arrived = unpack_search(pack_search(request, travelling))  # type: ignore[arg-type]
    assert arrived.domains == request.domains
    assert np.array_equal(arrived.queries, request.queries)
    assert (arrived.exclude_doc_ids is None) == (not excludes)
    assert unpack_ids(pack_ids([3, 4], names)) == ([3, 4], tuple(names))
    assert unpack_ids(pack_ids([3, 4])) == ([3, 4], ())


@settings(max_examples=300)
@given(st.data())
def test_damaged_domains_are_refused_or_are_another_message(data: st.DataObject) -> None:
    request = SearchRequest(
        queries=np.ones((2, 3), dtype=np.float32),
        k=5,
        exclude_doc_ids=None,
        exact=False,
        domains=("law", "biomed"),
    )
    whole = bytearray(pack_search(request, "float32"))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for body in (bytes(whole), bytes(whole[: data.draw(st.integers(0, len(whole)))])):
        try:
            unpack_search(body)
        except BadMessage:
            continue


def test_too_many_names_are_refused_before_they_travel() -> None:
    request = SearchRequest(
        queries=np.ones((1, 1), dtype=np.float32),
        k=1,
        exclude_doc_ids=None,
        exact=False,
        domains=tuple(f"domain {number}" for number in range(10_000)),
    )
    with pytest.raises(ValueError, match="name fewer"):
        pack_search(request, "float32")


def test_searches_of_other_domains_are_not_joined() -> None:
    def of_domains(number: int, *domains: str) -> Waiting:
        return waiting(number, toy_queries(1), domains=domains)

    queue = deque([of_domains(0, "a"), of_domains(1), of_domains(2, "a"), of_domains(3, "b")])
    joined = [[w.preamble.number for w in take_joinable(queue, 99)] for _ in range(3)]
    assert joined == [[0, 2], [1], [3]]
