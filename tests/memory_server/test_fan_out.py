"""All shards over sockets: the answer of one, whatever breaks; or an error that says what did."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_server.api import Retrieved
from memory_server.errors import (
    MemoryClosed,
    UnknownEntry,
    UnknownEpoch,
)
from memory_server.replies import ShardReply, combine_replies, merge_replies
from memory_server.shard.shard import Shard
from memory_server.wire.fan_out import SearchFanout, groups_of
from tests.memory_server.support_search import (
    SECRET,
    EchoShard,
    Servers,
    asking,
    numbered,
    sealed_shards,
    served,
    stage,
)
from tests.toy_memory import toy_entries, toy_queries, toy_store

FIELDS = ("ids", "scores", "tokens", "doc_ids")


def assert_same(ours: Retrieved, theirs: Retrieved) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert (ours.epoch, ours.encoder_step) == (theirs.epoch, theirs.encoder_step)


def direct(shards: list[Shard], queries: torch.Tensor, k: int, **options: Any) -> Retrieved:
    replies = [shard.search(queries, k, **options) for shard in shards]
    return merge_replies(replies, k, device=queries.device)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Shard]]:
    path = tmp_path_factory.mktemp("fan_out") / "s"
    toy_store(path, toy_entries(range(60)))
    made = sealed_shards(path, 3)
    yield made
    for shard in made:
        shard.close()


@pytest.fixture(scope="module")
def fanout(shards: list[Shard]) -> Iterator[SearchFanout]:
    with served(*shards) as servers, asking(servers, [1, 1, 1]) as made:
        yield made


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rows=st.integers(0, 5), k=st.integers(1, 70), seed=st.integers(0, 99))
def test_answers_are_those_of_the_shards_asked_directly(
    shards: list[Shard], fanout: SearchFanout, rows: int, k: int, seed: int
) -> None:
    queries = toy_queries(rows, seed)
    exclude = torch.arange(rows) + seed % 7 if seed % 2 else None
    replies = [shard.search(queries, k, exclude) for shard in shards]
    assert_same(
        fanout.search(queries, k, exclude), merge_replies(replies, k, device=queries.device)
    )


def test_entries_come_in_the_order_asked(fanout: SearchFanout) -> None:
    assert [e.text for e in fanout.entries([41, 3, 3])] == ["text 41 of 0", *["text 3 of 0"] * 2]
    assert fanout.entries([]) == []
    with pytest.raises(UnknownEntry, match="999"):
        fanout.entries([1, 999])


def test_the_shards_own_errors_arrive(fanout: SearchFanout) -> None:
    with pytest.raises(ValueError, match="width"):
        fanout.search(torch.zeros(1, 3), 2)
    with pytest.raises(ValueError, match="NaN"):
        fanout.search(torch.full((1, 8), torch.nan), 2)
    with pytest.raises(ValueError, match="k=0"):
        fanout.search(toy_queries(1), 0)
    with pytest.raises(UnknownEpoch, match="does not hold epoch 77"):
        fanout.search(toy_queries(1), 2, epoch=77)
    with pytest.raises(ValueError, match="allowed"):
        fanout.search(torch.zeros(1, 8).expand(5_000_000, 8), 2)
    assert_same(fanout.search(toy_queries(1), 2), fanout.search(toy_queries(1), 2))


def test_many_threads_at_once_each_get_their_own_answer() -> None:
    with served(EchoShard(0), EchoShard(1)) as servers, asking(servers, [1, 1]) as fanout:

        def ask(number: int) -> bool:
            got = [fanout.search(numbered(number, n), 2).ids[:, 0].tolist() for n in range(30)]
            return got == [[100 * number, 100 * n] for n in range(30)]

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(ask, range(6)))
        assert servers.running[0, 0].stats().requests == 180


@given(st.integers(1, 200), st.integers(2, 40))
def test_groups_hold_every_shard_once_and_are_few(shards: int, fan_in: int) -> None:
    groups = groups_of(shards, fan_in)
    assert [shard for group in groups for shard in group] == list(range(shards))
    if shards > fan_in:
        assert len(groups) <= shards**0.5 + 1
        assert max(map(len, groups)) <= shards**0.5 + 1


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Shard], Servers]]:
    path = tmp_path_factory.mktemp("tree") / "s"
    toy_store(path, toy_entries(range(70)))
    shards = sealed_shards(path, 20)
    with served(*shards) as servers:
        yield shards, servers
    for shard in shards:
        shard.close()


def test_a_tree_of_twenty_shards_answers_as_all_asked_directly(
    tree: tuple[list[Shard], Servers],
) -> None:
    shards, servers = tree
    with asking(servers, [1] * 20) as by_tree, asking(servers, [1] * 20, fan_in=20) as flat:
        flat.search(toy_queries(1), 1)
        by_tree.entries([5])  # so that all addresses are known
        for k in (1, 4, 90):
            queries = toy_queries(4, seed=k)
            theirs = direct(shards, queries, k)
            assert_same(by_tree.search(queries, k), theirs)
            assert_same(flat.search(queries, k), theirs)
        stats = by_tree.stats()
        assert (stats.relayed, stats.relays_failed) == (15, 0)
        assert stats.asked == 20 + 3 * 5
        assert flat.stats().relayed == 0
        with pytest.raises(UnknownEpoch):
            by_tree.search(toy_queries(1), 2, epoch=9)


def test_a_group_whose_relay_or_member_is_lost_is_asked_directly(
    tree: tuple[list[Shard], Servers],
) -> None:
    shards, servers = tree
    queries = toy_queries(3)
    with asking(servers, [1] * 20) as wait, asking(servers, [1] * 20, policy="degrade") as go_on:
        for fanout in (wait, go_on):
            fanout.entries([5])
            assert_same(fanout.search(queries, 5), direct(shards, queries, 5))
        servers.stop(13)
        partial = go_on.search(queries, 5)
        assert partial.missing_shards == (13,)
        assert_same(partial, direct([s for s in shards if s.shard != 13], queries, 5))
        again = threading.Timer(0.3, lambda: servers.start(shards[13]))
        again.start()
        assert_same(wait.search(queries, 5), direct(shards, queries, 5))
        again.join()
        assert wait.stats().relays_failed >= 1


def test_shards_that_answer_from_two_epochs_are_asked_for_the_newer() -> None:
    old, new = EchoShard(0, live=1), EchoShard(1, live=2)
    with served(old, new) as servers, asking(servers, [1, 1]) as fanout:
        assert fanout.search(numbered(3), 2).epoch == 2
        assert fanout.stats().epoch_switches == 1
        assert fanout.search(numbered(3), 2, epoch=1).epoch == 1


def test_a_switch_while_searches_run_never_mixes_epochs(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(30)))
    shards = sealed_shards(tmp_path / "s", 2)
    for shard in shards:
        stage(shard, 2, store.head())
    queries = toy_queries(2)
    right = {epoch: direct(shards, queries, 3, epoch=epoch) for epoch in (1, 2)}
    done = threading.Event()

    def switch() -> None:
        for turn in range(200):
            for shard in shards:
                shard.activate(1 + turn % 2)
                done.wait(0.0005)
        done.set()

    with served(*shards) as servers, asking(servers, [1, 1]) as fanout:
        switching = threading.Thread(target=switch)
        switching.start()
        seen = set()
        while not done.is_set():
            got = fanout.search(queries, 3)
            assert_same(got, right[got.epoch])
            seen.add(got.epoch)
        switching.join()
        assert seen == {1, 2}
    for shard in shards:
        shard.close()


def test_an_epoch_released_while_others_are_asked_for_it_is_no_error() -> None:
    class Released(EchoShard):
        def search(self, *args: Any, **kwargs: Any) -> ShardReply:
            if kwargs["epoch"] == 2:
                other.live = 3
                self.live = 3
                raise UnknownEpoch("released")
            return super().search(*args, **kwargs)

    old, other = Released(0, live=1), EchoShard(1, live=2)
    with served(old, other) as servers, asking(servers, [1, 1]) as fanout:
        assert fanout.search(numbered(3), 2).epoch == 3


def test_a_closed_fan_out_says_so() -> None:
    with served(EchoShard(0)) as servers, asking(servers, [1]) as fanout:
        fanout.search(numbered(1), 1)
        fanout.close()
        with pytest.raises(MemoryClosed):
            fanout.search(numbered(1), 1)


def test_bad_settings_are_refused() -> None:
    for options, words in (
        ({"replicas": [1, 0]}, "at least 1"), ({"policy": "hope"}, "allowed"),
        ({"deadline_s": 0}, "deadline_s"), ({"fan_in": 1}, "fan_in"),
        ({"queries": "int8"}, "float16"), ({"secret": b"x"}, "guessed"),
    ):  # fmt: skip
        given_options: dict[str, Any] = {
            "replicas": [1], "resolve_endpoint": lambda s, r: None, "secret": SECRET, **options
        }  # fmt: skip
        with pytest.raises(ValueError, match=words):
            SearchFanout(**given_options)


@given(
    shards=st.integers(1, 4), rows=st.integers(0, 3), k=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_combining_in_any_grouping_gives_the_same(
    shards: int, rows: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def reply(shard: int) -> ShardReply:
        scores = torch.randint(0, 3, (rows, k), generator=generator).float().sort(1, True).values
        ids = torch.arange(rows * k).reshape(rows, k) * shards + shard
        return ShardReply(
            shard=shard, ids=ids.numpy(), scores=scores.numpy(), doc_ids=(ids // 2).numpy(),
            tokens=ids[:, :, None].expand(-1, -1, 3).numpy().astype("uint16" if shard else "int32"),
            epoch=1, encoder_step=0, exact=shard != 2,
        )  # fmt: skip

    replies = [reply(shard) for shard in range(shards)]
    whole = merge_replies(replies, k, device=torch.device("cpu"))
    parts = [combine_replies(replies[:2], k), *replies[2:]]
    combined = merge_replies(parts, k, device=torch.device("cpu"))
    assert_same(combined, whole)
    assert combined.exact == whole.exact
