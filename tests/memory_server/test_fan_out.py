"""All shards over sockets: the answer of one, whatever breaks; or an error that says what did."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_server.api import Retrieved
from memory_server.combined_replies import combine_replies
from memory_server.errors import (
    AccessRefused,
    MemoryClosed,
    Overloaded,
    ShardLost,
    ShardRestoring,
    UnknownEntry,
    UnknownEpoch,
)
from memory_server.fan_out import SearchFanout, groups_of
from memory_server.replies import ShardReply, merge_replies
from memory_server.search_server import SearchServer
from memory_server.shard import Shard
from tests.memory_server.support_search import (
    OTHER_SECRET,
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


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    for _ in range(int(seconds / 0.01)):
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


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


def test_a_restarted_server_is_found_at_its_new_place() -> None:
    with served(EchoShard(0), EchoShard(1)) as servers, asking(servers, [1, 1]) as fanout:
        fanout.search(numbered(1), 1)
        servers.stop(1)
        threading.Timer(0.2, lambda: servers.start(EchoShard(1, live=1))).start()
        assert fanout.search(numbered(2), 1).ids.tolist() == [[200]]
        assert fanout.stats().connections_lost >= 1


def test_a_server_that_took_over_anothers_port_is_never_believed() -> None:
    """Shard 1 moved, and shard 0 restarted on its old port; the client still has the old places."""
    with (
        served(EchoShard(0), EchoShard(1)) as servers,
        asking(servers, [1, 1], deadline_s=5.0) as fanout,
    ):
        right = dict(servers.running)
        servers.running = {(0, 0): right[1, 0], (1, 0): right[0, 0]}
        back = threading.Timer(0.02, lambda: servers.running.update(right))
        back.start()
        assert fanout.search(numbered(2), 1).scores.tolist() == [[0.0]]
        back.join()
        assert all(server.stats().refused for server in right.values())


def test_another_secret_is_an_error_that_says_so() -> None:
    with (
        served(EchoShard(0)) as servers,
        asking(servers, [1], secret=OTHER_SECRET) as fanout,
        pytest.raises(AccessRefused, match="attach"),
    ):
        fanout.search(numbered(1), 1)


def test_degrade_goes_on_and_says_without_whom_until_it_is_back() -> None:
    shard = EchoShard(1)
    with (
        served(EchoShard(0), shard) as servers,
        asking(servers, [1, 1], policy="degrade") as fanout,
    ):
        assert fanout.search(numbered(1), 1).missing_shards == ()
        servers.stop(1)
        for number in (2, 3):
            got = fanout.search(numbered(number), 1)
            assert got.missing_shards == (1,)
            assert got.ids.tolist() == [[100 * number]]
        servers.start(shard)
        assert within(10, lambda: fanout.search(numbered(1), 1).missing_shards == ())
        shard.failing = [ShardRestoring("soon")]
        assert fanout.search(numbered(1), 1).missing_shards == (1,)
        servers.stop(0)
        servers.stop(1)
        with pytest.raises(ShardLost, match="no shard answered"):
            fanout.search(numbered(1), 1)


def test_waiting_ends_at_the_deadline_with_names_and_reasons() -> None:
    with (
        served(EchoShard(0)) as servers,
        asking(servers, [1, 1], deadline_s=0.5) as fanout,
        pytest.raises(ShardLost, match=r"shard 1: .*the actor is restarting.*deadline_s"),
    ):
        fanout.search(numbered(1), 1)


def test_one_that_is_gone_for_good_is_not_waited_for() -> None:
    with served(EchoShard(0)) as servers:

        def resolve(shard: int, replica: int) -> str:
            if shard == 1:
                raise ShardLost("its name is gone")
            return servers.resolve(shard, replica)

        with (
            asking(servers, [1, 1], deadline_s=1000.0, resolve_endpoint=resolve) as fanout,
            pytest.raises(ShardLost, match="its name is gone"),
        ):
            fanout.search(numbered(1), 1)


def test_a_slow_replica_is_hedged_and_the_first_answer_wins() -> None:
    slow, quick = EchoShard(0), EchoShard(0)
    with served(slow) as servers, asking(servers, [2], hedge_after=0.05) as fanout:
        servers.start(quick, 1)
        while fanout.search(numbered(1), 1).ids.tolist() and not slow.batches:
            pass
        slow.gate.clear()
        for number in range(5, 15):
            assert fanout.search(numbered(number), 1).ids.tolist() == [[100 * number]]
        stats = fanout.stats()
        slow.gate.set()
        assert stats.hedged == stats.hedges_won
        assert stats.searches > stats.hedged  # soon the slow one is not even asked first


def test_a_lost_replica_costs_no_answer() -> None:
    with served(EchoShard(0)) as servers, asking(servers, [2]) as fanout:
        servers.start(EchoShard(0), 1)
        for number in range(10):
            fanout.search(numbered(number), 1)
        servers.stop(0, 0)
        for number in range(10):
            assert fanout.search(numbered(number), 1).ids.tolist() == [[100 * number]]
        servers.start(EchoShard(0), 0)
        assert within(10, lambda: bool(fanout.search(numbered(1), 1)) and _requests(servers, 0) > 0)


def _requests(servers: Servers, replica: int) -> int:
    return servers.running[0, replica].stats().requests


def test_an_overloaded_replica_is_passed_over_and_overload_ends_at_the_deadline() -> None:
    full, other = EchoShard(0), EchoShard(0)
    with served() as servers:
        servers.start(full, 0, queue_limit=1)
        servers.start(other, 1)
        full.gate.clear()
        with asking(servers, [1]) as first, ThreadPoolExecutor(2) as pool:
            running = [pool.submit(first.search, numbered(1), 1)]
            assert full.asked.acquire(timeout=20)
            running.append(pool.submit(first.search, numbered(2), 1))
            assert within(20, lambda: servers.running[0, 0].stats().queue == 1)
            with asking(servers, [2]) as both:
                for number in range(6):
                    assert both.search(numbered(number), 1).ids.tolist() == [[100 * number]]
            with asking(servers, [1], deadline_s=0.3) as late:
                with pytest.raises(Overloaded, match="1 searches wait, 1 may"):
                    late.search(numbered(3), 1)
                assert late.stats().overloaded >= 2
            patient = pool.submit
            full.gate.set()
            assert [r.result(20).ids.tolist() for r in running] == [[[100]], [[200]]]
            assert patient(first.search, numbered(4), 1).result(20).ids.tolist() == [[400]]


def test_without_a_socket_the_actor_is_asked_and_that_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard = EchoShard(1)

    def call(number: int, replica: int, method: str, arguments: dict[str, Any], _: float) -> Any:
        if method == "entries":
            return []
        queries = torch.from_numpy(arguments.pop("queries_BQ"))
        arguments.pop("wait_s")
        return shard.search(queries, **arguments)

    with served(EchoShard(0)) as servers:

        def resolve(number: int, replica: int) -> str | None:
            return None if number == 1 else servers.resolve(number, replica)

        options: dict[str, Any] = {"resolve_endpoint": resolve, "actor_call": call}
        with asking(servers, [1, 1], **options) as fanout:
            for number in (3, 4):
                assert fanout.search(numbered(number), 1).ids.tolist() == [[100 * number]]
            assert fanout.stats().actor_calls == 2
            assert caplog.text.count("by way of its actor") == 1
            shard.failing = [UnknownEpoch("from the actor")]
            with pytest.raises(UnknownEpoch, match="from the actor"):
                fanout.search(numbered(1), 1)
        with (
            asking(servers, [1, 1], deadline_s=0.5, resolve_endpoint=resolve) as alone,
            pytest.raises(ShardLost, match="shard 1: it has no socket"),
        ):
            alone.search(numbered(1), 1)


def test_a_port_that_refuses_while_the_actor_answers_is_left_for_the_actor() -> None:
    dead = SearchServer(EchoShard(0), secret=SECRET)
    dead.close()

    def call(number: int, replica: int, method: str, arguments: dict[str, Any], _: float) -> Any:
        return EchoShard(0).search(torch.from_numpy(arguments["queries_BQ"]), arguments["k"])

    options: dict[str, Any] = {"resolve_endpoint": lambda s, r: dead.endpoint, "actor_call": call}
    with asking(Servers(), [1], **options) as fanout:
        assert fanout.search(numbered(6), 1).ids.tolist() == [[600]]
        assert fanout.stats().connections_lost == 3


def _serve_and_die_when_asked(pipe: Connection) -> None:
    shard = EchoShard(0)
    shard.gate.clear()
    server = SearchServer(shard, secret=SECRET)
    pipe.send(server.endpoint)
    shard.asked.acquire()
    pipe.send("asked")
    threading.Event().wait(60)


def test_a_process_killed_in_the_middle_of_a_search_costs_no_answer() -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve_and_die_when_asked, args=(theirs,), daemon=True)
    process.start()
    place = {"now": ours.recv()}
    with (
        served() as servers,
        asking(servers, [1], resolve_endpoint=lambda s, r: place["now"]) as fanout,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(fanout.search, numbered(8), 1)
        assert ours.recv() == "asked"
        place["now"] = servers.start(EchoShard(0)).endpoint
        process.kill()
        process.join()
        assert running.result(20).ids.tolist() == [[800]]
        assert fanout.stats().connections_lost == 1


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
