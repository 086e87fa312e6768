"""A memory that reads some domains answers as one that has nothing else, local or by actors."""

import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memory_server.actors.client import RayMemory
from memory_server.api import Memory, Retrieved
from memory_server.errors import UnknownDomain, UnknownEntry
from memory_server.index.base import IndexSettings
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.ray_fixture import local_ray
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

WAIT_S = 60.0
Start = Callable[..., Memory]
numbers = itertools.count()

# More than a block's rows, and fewer; biomed in two segments with another domain between them.
SEGMENTS = (
    ("default", toy_entries(range(0, 2500))),
    ("biomed", toy_entries(range(3000, 4300))),
    ("law", toy_entries(range(5000, 5020))),
    ("biomed", toy_entries(range(6000, 6015))),
)
REMOVED = [7, 3001, 5003, 6001]
SETS = (("biomed",), ("law", "default"), ("default", "biomed", "law"), ("law",))


def of(domains: tuple[str, ...]) -> list[ToyEntry]:
    return [e for name, es in SEGMENTS if name in domains for e in es if e.id not in REMOVED]


@pytest.fixture(
    scope="module", params=["local", pytest.param("ray", marks=pytest.mark.integration)]
)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "local":
        yield "local"
        return
    with local_ray():
        yield "ray"


@pytest.fixture(scope="module")
def start(kind: str) -> Iterator[Start]:
    """Start memories of the kind under test, and close them at the end."""
    started: list[Memory] = []

    def begin(store: Store, **options: object) -> Memory:
        settings = {"encoder": toy_factory, "weights": toy_weights(1), **options}
        memory: Memory
        if kind == "local":
            memory = LocalMemory(store.path, **settings)
        else:
            # Three shards, of which two are asked by way of a relay.
            placed = {"shards": 3, "fan_in": 2, "cpus_per_shard": 0.3}
            name = f"domains-{next(numbers)}"
            memory = RayMemory.start(store.path, name=name, **placed, **settings)
        started.append(memory)
        return memory

    yield begin
    for memory in started:
        memory.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(tmp_path_factory.mktemp("domains") / "store")


def make(path: Path) -> Store:
    store = empty_store(path)
    for number, (domain, entries) in enumerate(SEGMENTS):
        segment = write_toy_segment(store, f"s{number}", entries)
        store.commit(add_segments=[segment], domain=domain, message=domain)
    store.commit(remove_ids=REMOVED, message="some rows are gone")
    return store


@pytest.fixture(scope="module")
def reading(start: Start, store: Store, kind: str) -> Callable[[tuple[str, ...]], Memory]:
    """Memories that read some domains; those by actors are clients of one."""
    if kind == "local":
        return lambda domains: start(store, domains=domains)
    whole = start(store)
    assert isinstance(whole, RayMemory)
    name = whole.name
    return lambda domains: RayMemory.attach(name, domains=domains)


def floats(rows: int) -> Tensor:
    return torch.randn(rows, KEY_WIDTH, generator=torch.Generator().manual_seed(rows))


def refresh(memory: Memory, **what: object) -> int:
    epoch = memory.stage(**what)  # type: ignore[arg-type]
    memory.wait_sealed(epoch, WAIT_S)
    return memory.activate(epoch)


def assert_same(given: Retrieved, wanted: Retrieved) -> None:
    for name in ("ids", "scores", "doc_ids", "tokens"):
        assert torch.equal(getattr(given, name), getattr(wanted, name)), name
    assert given.exact
    assert given.missing_shards == ()


@pytest.mark.parametrize("domains", SETS)
def test_answers_are_those_of_a_memory_of_these_alone_bit_for_bit(
    reading: Callable[[tuple[str, ...]], Memory], store: Store, domains: tuple[str, ...]
) -> None:
    entries = of(domains)
    with (
        LocalMemory(
            store, encoder=toy_factory, weights=toy_weights(1), domains=domains
        ) as reference,
        reading(domains) as memory,
    ):
        queries = toy_queries(9)
        for excluded in (None, torch.tensor([1000, 1001, -1, 5, 1666, 1667, 2000, 2, 3])):
            given = memory.search(queries, 6, exclude_doc_ids=excluded)
            exclude = None if excluded is None else excluded.tolist()
            assert given.ids.tolist() == expected_ids(entries, toy_weights(1), queries, 6, exclude)
            assert_same(given, reference.search(queries, 6, exclude_doc_ids=excluded))
            exactly = {"exclude_doc_ids": excluded, "exact": True}
            assert_same(
                memory.search(floats(9), 30, **exactly),  # type: ignore[arg-type]
                reference.search(floats(9), 30, **exactly),  # type: ignore[arg-type]
            )
        assert memory.info().entries == reference.info().entries == len(entries)
        wanted = [entries[-1].id, entries[0].id]
        assert memory.entries(wanted) == reference.entries(wanted)
        for other in (e for name, es in SEGMENTS if name not in domains for e in es[10:11]):
            with pytest.raises(UnknownEntry, match=str(other.id)):
                memory.entries([wanted[0], other.id])


def test_more_is_asked_for_than_the_domain_has(
    reading: Callable[[tuple[str, ...]], Memory],
) -> None:
    with reading(("law",)) as memory:
        found = memory.search(toy_queries(2), 25)
        assert (found.ids == -1).sum(1).tolist() == [6, 6]
        assert bool((found.scores[:, 19:] == float("-inf")).all())
        assert memory.search(torch.empty(0, KEY_WIDTH), 3).ids.shape == (0, 3)


def test_a_memory_without_named_domains_has_all(
    reading: Callable[[tuple[str, ...]], Memory],
) -> None:
    with reading(()) as memory:
        everything = of(("default", "biomed", "law"))
        assert memory.info().entries == len(everything)
        queries = toy_queries(3)
        expected = expected_ids(everything, toy_weights(1), queries, 4)
        assert memory.search(queries, 4).ids.tolist() == expected


def test_an_unknown_domain_is_refused_and_the_known_are_named(
    start: Start, reading: Callable[[tuple[str, ...]], Memory], store: Store
) -> None:
    said = rf"version {store.head()} has no domain 'bio', 'x'; it has biomed, default, law$"
    for begin in (lambda names: start(store, domains=names), reading):
        with pytest.raises(UnknownDomain, match=said):
            begin(("bio", "law", "x"))


@pytest.mark.parametrize("key_dtype", ["float32", "int8"])
def test_domains_hold_over_edits_and_refreshes(
    start: Start, tmp_path: Path, key_dtype: str
) -> None:
    store = make(tmp_path / "store")
    index = IndexSettings(key_dtype=key_dtype)  # type: ignore[arg-type]
    memory = start(store, domains=("biomed",), index=index)
    queries = toy_queries(5)
    added = toy_entries(range(7000, 7030))
    for domain in ("law", "biomed"):
        entries = added[:15] if domain == "law" else added[15:]
        segment = write_toy_segment(store, f"more-{domain}", entries)
        store.commit(add_segments=[segment], domain=domain, message="more")
    store.commit(remove_ids=[3002], message="one goes")
    refresh(memory, encoder_step=0, content_version=store.head())
    now = [e for e in [*of(("biomed",)), *added[15:]] if e.id != 3002]
    assert memory.info().entries == len(now)
    found = memory.search(queries, 7, exact=True)
    assert found.ids.tolist() == expected_ids(now, toy_weights(1), queries, 7)
    refresh(memory, encoder_step=3, weights=toy_weights(2))
    found = memory.search(queries, 7, exact=True)
    assert found.encoder_step == 3
    assert found.ids.tolist() == expected_ids(now, toy_weights(2), queries, 7)
    # Without an entry, or unplugged, a domain is not there.
    before = memory.info().content_version
    unplugged = store.unplug("biomed")
    store.rollback(before)
    emptied = store.commit(remove_ids=[e.id for e in now], message="all of biomed goes")
    for version in (emptied, unplugged):
        with pytest.raises(UnknownDomain, match=r"has no domain 'biomed'; it has default, law$"):
            memory.stage(encoder_step=3, content_version=version)
    assert memory.info().content_version == before
    assert memory.search(queries, 7, exact=True).ids.tolist() == found.ids.tolist()


def test_clients_of_one_memory_read_different_domains(
    kind: str, start: Start, tmp_path: Path
) -> None:
    if kind == "local":
        pytest.skip("a memory in process has one client")
    store = make(tmp_path / "store")
    whole = start(store)
    assert isinstance(whole, RayMemory)
    queries = toy_queries(4)
    with RayMemory.attach(whole.name, domains=["law"]) as law:
        copy = pickle.loads(pickle.dumps(law))
        for client in (law, copy):
            assert set(client.search(queries, 3).ids.flatten().tolist()) <= set(range(5000, 5020))
        assert whole.info().entries == len(of(("default", "biomed", "law")))
        expected = expected_ids(of(("default", "biomed", "law")), toy_weights(1), queries, 3)
        assert whole.search(queries, 3).ids.tolist() == expected
        # Another client makes content live that lacks it.
        refresh(whole, encoder_step=0, content_version=store.unplug("law"))
        for ask in (lambda: law.search(queries, 3), lambda: law.entries([5000]), law.info):
            with pytest.raises(
                UnknownDomain, match=r"has no domain 'law'; it has biomed, default$"
            ):
                ask()
        left = of(("default", "biomed"))
        assert whole.search(queries, 3).ids.tolist() == expected_ids(
            left, toy_weights(1), queries, 3
        )
        copy.close()
