"""Servers that move, slow down, fill up or die: the right answer, or an error that says why."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from memory_server.errors import (
    AccessRefused,
    Overloaded,
    ShardLost,
    ShardRestoring,
    UnknownEpoch,
)
from memory_server.wire.fan_out import ACTOR_CALLS_AT_ONCE
from memory_server.wire.search_messages import SearchRequest
from memory_server.wire.search_server import SearchServer
from tests.memory_server.support_search import (
    OTHER_SECRET,
    SECRET,
    DeafToRelays,
    EchoShard,
    Servers,
    asking,
    numbered,
    served,
)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    for _ in range(int(seconds / 0.01)):
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


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


def test_relays_that_hang_are_passed_over_long_before_the_deadline() -> None:
    shards = [EchoShard(number) for number in range(3)]
    with (
        served(*shards) as servers,
        asking(servers, [1, 1, 1], fan_in=2, deadline_s=300.0) as fanout,
        ThreadPoolExecutor(1) as pool,
    ):
        fanout.entries([])  # so that all addresses are known
        while fanout.stats().relayed < 64:
            fanout.search(numbered(1), 1)
        for number in (1, 2):
            servers.stop(number)
            servers.running[number, 0] = DeafToRelays(shards[number])
        reply = pool.submit(fanout.search, numbered(7), 1).result(60)
        assert reply.ids.tolist() == [[700]]
        assert fanout.stats().relays_failed >= 1


def test_calls_by_way_of_actors_are_as_bounded_as_a_queue_is() -> None:
    shard = EchoShard(0)
    shard.gate.clear()

    def call(number: int, replica: int, method: str, arguments: dict[str, Any], _: float) -> Any:
        return shard.search(torch.from_numpy(arguments["queries_BQ"]), arguments["k"])

    options: dict[str, Any] = {"resolve_endpoint": lambda s, r: None, "actor_call": call}
    with (
        asking(Servers(), [1], **options) as fanout,
        asking(Servers(), [1], **options) as other,
        ThreadPoolExecutor(ACTOR_CALLS_AT_ONCE + 1) as pool,
    ):
        running = [
            pool.submit(fanout.search, numbered(number), 1) for number in range(ACTOR_CALLS_AT_ONCE)
        ]
        for _ in running:
            shard.asked.acquire()
        late = pool.submit(fanout.search, numbered(99), 1)
        assert within(20, lambda: fanout.stats().overloaded > 0)
        shard.gate.set()
        assert other.search(numbered(5), 1).ids.tolist() == [[500]]  # the bound is a process's
        for number, reply in enumerate(running):
            assert reply.result(20).ids.tolist() == [[100 * number]]
        assert late.result(20).ids.tolist() == [[9900]]


def test_a_server_queues_what_comes_by_its_actor_with_the_rest() -> None:
    shard = EchoShard(0)
    shard.gate.clear()
    with served() as servers, ThreadPoolExecutor(3) as pool:
        server = servers.start(shard, queue_limit=1)

        def ask(number: int) -> Any:
            request = SearchRequest(
                queries=numbered(number).numpy(), k=1, exclude_doc_ids=None, exact=False
            )
            return server.ask(request, epoch=None, wait_s=0.0, timeout_s=20.0)

        first = pool.submit(ask, 1)
        shard.asked.acquire()
        second = pool.submit(ask, 2)
        assert within(20, lambda: server.stats().queue == 1)
        with pytest.raises(Overloaded, match="1 searches wait, 1 may"):
            ask(3)
        shard.gate.set()
        assert [f.result(20).ids.tolist() for f in (first, second)] == [[[100]], [[200]]]
        assert server.stats().overloaded == 1
        shard.failing = [UnknownEpoch("of the shard")]
        with pytest.raises(UnknownEpoch, match="of the shard"):
            ask(4)
