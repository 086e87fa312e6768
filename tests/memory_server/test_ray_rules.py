"""The rules by which a coordinator decides, without Ray: seals, room, places, state on disk."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from memory_server.actors.book import KeptBook
from memory_server.actors.coming_up import ComingUp
from memory_server.actors.follower import Follower
from memory_server.actors.leader import RayPin
from memory_server.actors.metrics import latency_sample
from memory_server.actors.names import Address, memory_of, shard_name
from memory_server.actors.orders import Need, Order, Orders, judge, orders_of, progress, shortage
from memory_server.actors.places import Node, assign_nodes, check_resources
from memory_server.actors.restored import RestoredShard
from memory_server.actors.server_book import ServerBook
from memory_server.actors.state import StateDirectory
from memory_server.errors import (
    CoordinatorLost,
    MemoryServerError,
    RefreshFailed,
    ShardRestoring,
    StateDamaged,
    StateNotFound,
    StateUnusable,
)
from memory_server.replies import ShardReply
from memory_server.shard.epochs import EpochBook, EpochPlan, Receipt
from memory_server.shard.held_epoch import ShardStatus
from memory_server.shard.shard import Shard
from memory_server.stats import latency
from memory_server.wire.search_stats import LATENCY_BUCKETS_S
from tests.toy_memory import (
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
)

ADDRESSES = [(0, 0), (0, 1), (1, 0), (1, 1)]
PLAN = EpochPlan(epoch=3, content_version="v", encoder_step=7, weights_id=2)


def receipt(shard: int, **other: object) -> Receipt:
    settings = {
        "epoch": 3, "shard": shard, "encoder_step": 7, "content_version": "v", "rows": 12,
        "live_rows": 10, "key_width": 8, "key_checksum": 100 + shard, "layout": 5,
        "encoded_rows": 12, "bytes": {"keys": 384}, "seconds": 1.0,
    }  # fmt: skip
    return Receipt(**{**settings, **other})  # type: ignore[arg-type]


def status(made: Receipt | None, **other: object) -> ShardStatus:
    settings = {"state": "sealed", "done": 12, "total": 12, "error": None, "seconds": 1.0}
    return ShardStatus(receipt=made, **{**settings, **other})  # type: ignore[arg-type]


def statuses(**changed: object) -> dict[Address, ShardStatus]:
    """Of four replicas that agree, but for what replica 1 of shard 1 is told to say."""
    agreed = {address: status(receipt(address[0])) for address in ADDRESSES}
    return {**agreed, (1, 1): status(receipt(1, **changed))}


def test_an_epoch_is_sealed_by_one_receipt_of_each_shard() -> None:
    verdict = judge(PLAN, statuses(), ADDRESSES, entries=20)
    assert verdict is not None
    assert verdict.failure is None
    assert verdict.receipts == (receipt(0), receipt(1))
    # Replicas may hold the same keys in other blocks; then their checksums say nothing.
    other = judge(PLAN, statuses(layout=6, key_checksum=1), ADDRESSES, entries=20)
    assert other is not None
    assert other.failure is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"key_checksum": 1}, "replicas 0 and 1 of shard 1 made different keys"),
        ({"rows": 13}, "replica 1 of shard 1 holds 13 rows"),
        ({"live_rows": 9}, "9 of them live"),
        ({"key_width": 4}, r"widths \[4, 8\]"),
        ({"encoder_step": 6}, "not of what was staged"),
        ({"content_version": "w"}, "not of what was staged"),
    ],
)
def test_replicas_that_disagree_cannot_seal(changed: Mapping[str, object], reason: str) -> None:
    verdict = judge(PLAN, statuses(**changed), ADDRESSES, entries=20)
    assert verdict is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(verdict.failure)


def test_entries_must_not_be_lost_between_shards() -> None:
    verdict = judge(PLAN, statuses(), ADDRESSES, entries=21)
    assert verdict is not None
    assert "hold 20 live entries together, the content has 21" in str(verdict.failure)


def test_who_is_silent_is_waited_for_and_one_that_failed_decides() -> None:
    some = statuses()
    del some[0, 1]
    assert judge(PLAN, some, ADDRESSES, entries=20) is None
    some[0, 0] = status(None, state="encoding", done=3, remaining_s=4.0)
    some[1, 0] = status(None, state="encoding", done=6, remaining_s=None)
    assert judge(PLAN, some, ADDRESSES, entries=20) is None
    assert progress(some).done == 3 + 6
    assert progress(some).total == 24
    assert progress(some).remaining_s is None
    some[1, 0] = status(None, state="encoding", done=6, remaining_s=2.0)
    assert progress(some).remaining_s == 4.0
    some[1, 1] = status(None, state="failed", error="shard 1: no room")
    verdict = judge(PLAN, some, ADDRESSES, entries=20)
    assert verdict is not None
    assert verdict.failure == "shard 1: no room"


def test_what_an_epoch_needs_is_added_up_where_memory_is_shared() -> None:
    needs = {
        (0, 0): Need(place="node a", bytes=60, free=100),
        (1, 0): Need(place="node b", bytes=60, free=100),
    }
    assert shortage(needs) is None
    both = {**needs, (1, 0): Need(place="node a", bytes=60, free=110)}
    assert shortage(both) == ("node a", 120, 100)
    pending = {**needs, (1, 0): Need(place="node b", bytes=60, free=100, pending=50)}
    assert shortage(pending) == ("node b", 110, 100)
    # Key tables are a node's, not a shard's.
    tables = {
        (0, 0): Need(place="node a", bytes=40, free=100, tables=15),
        (1, 0): Need(place="node a", bytes=40, free=100, tables=15),
    }
    assert shortage(tables) is None
    more = {**tables, (1, 0): Need(place="node a", bytes=50, free=100, tables=15)}
    assert shortage(more) == ("node a", 105, 100)
    # An epoch that adds nothing is never in the way.
    nothing = {(0, 0): Need(place="node a", bytes=0, free=0, pending=10)}
    assert shortage(nothing) is None


def places(nodes: int, placement: str, *, cpus: float = 8.0, replicas: int = 2) -> list[list[str]]:
    """The nodes of each shard's replicas, for three shards of one CPU each."""
    there = [Node(id=f"n{i}", resources={"CPU": cpus}) for i in range(nodes)]
    found = assign_nodes(
        there,
        shards=3,
        replicas=replicas,
        each={"CPU": 1.0},
        placement=placement,  # type: ignore[arg-type]
    )
    return [[found[shard, r] for r in range(replicas)] for shard in range(3)]


def test_replicas_are_apart_and_actors_spread_or_packed() -> None:
    assert places(1, "spread") == [["n0", "n0"]] * 3
    for placement in ("spread", "pack"):
        assert all(len(set(of_one)) == 2 for of_one in places(4, placement))
    spread = [node for of_one in places(3, "spread") for node in of_one]
    assert sorted(spread) == ["n0", "n0", "n1", "n1", "n2", "n2"]
    assert places(3, "pack", replicas=1) == [["n0"]] * 3
    # Room comes first: two fit on a node, so the third goes to the next.
    assert places(3, "pack", replicas=1, cpus=2.0) == [["n0"], ["n0"], ["n1"]]


def test_what_no_cluster_has_is_refused() -> None:
    nodes = [Node(id="a", resources={"CPU": 4.0}), Node(id="b", resources={"CPU": 2.0})]
    check_resources(nodes, 6, {"CPU": 1.0})
    with pytest.raises(ValueError, match=r"cpus_per_shard=1 need 7 CPU, but the Ray cluster has 6"):
        check_resources(nodes, 7, {"CPU": 1.0})
    with pytest.raises(ValueError, match="no node"):
        check_resources(nodes, 1, {"CPU": 5.0})
    with pytest.raises(ValueError, match="gpus_per_shard"):
        check_resources(nodes, 1, {"GPU": 1.0})


def test_orders_say_everything_that_is_wanted() -> None:
    book = EpochBook()
    for _ in range(3):
        book.begin(encoder_step=1, new_weights=True, content_version="v")
    book.seal([receipt(0, epoch=2)])
    book.activate(2)
    book.fail(3, "no room")
    orders = orders_of(book, 9)
    assert (orders.revision, orders.live) == (9, 2)
    assert [(order.plan.epoch, order.sealed) for order in orders.epochs] == [(2, True), (1, False)]


def full_book() -> ServerBook:
    book = EpochBook()
    book.begin(encoder_step=1, new_weights=True, content_version="v")
    book.seal([receipt(0, epoch=1), receipt(1, epoch=1)])
    book.activate(1)
    book.begin(encoder_step=2, new_weights=True, content_version="w")
    book.fail(2, "no room")
    book.begin(encoder_step=3, new_weights=False, content_version="x")
    pin = book.pin(1, 5.0, now=100.0)
    book.leaving.add(3)
    return ServerBook(
        epochs=book,
        revision=12,
        requests={"token": 3},
        switches={"other": 1},
        successors={1: 3},
        leases={pin.id: 5.0},
        joins={"0-0": 2},
    )


def test_a_book_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    with pytest.raises(StateNotFound, match="with weights"):
        state.load(now=0.0)
    book = full_book()
    secret = state.create(book)
    assert StateDirectory(tmp_path / "state").secret() == secret
    assert state.load(now=100.0) == book
    later = state.load(now=500.0).epochs
    assert [pin.deadline for pin in later.pins.values()] == [505.0]  # its lease begins anew
    (tmp_path / "state" / "book.json").write_text('{"format": "pluglm-memory-server-1", "rev')
    with pytest.raises(StateDamaged, match=r"book\.json is damaged"):
        state.load(now=0.0)


def test_weights_are_kept_bit_by_bit_for_as_long_as_they_are_needed(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(ServerBook())
    given = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).to(torch.bfloat16),
        "step": torch.tensor(7),
    }
    for weights_id in (1, 2):
        state.save_weights(weights_id, given)
    state.tidy(of_weights(2))
    found = state.load_weights(2)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert found["half"].dtype == torch.bfloat16
    with pytest.raises(StateNotFound, match=r"1\.safetensors"):
        state.load_weights(1)
    damaged = state.weights_file(2)
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(StateDamaged, match="stage the weights again"):
        state.load_weights(2)
    # Weights of epochs that failed are not needed; those of the live one are.
    assert full_book().weights_needed() == {1}


def of_weights(*weights_ids: int) -> ServerBook:
    """A book whose newest epoch, of these weights, is live; earlier ones are not needed."""
    book = EpochBook(last_weights=weights_ids[0] - 1)
    for _ in weights_ids:
        epoch = book.begin(encoder_step=1, new_weights=True, content_version="v").epoch
        book.seal([receipt(0, epoch=epoch)])
        book.activate(epoch)
    return ServerBook(epochs=book)


def test_weights_that_are_being_staged_outlive_every_change_of_the_book(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(of_weights(2))
    state.save_weights(2, {"a": torch.zeros(2)})
    book = KeptBook(state, booked=lambda what: None)
    state.save_weights(3, {"a": torch.ones(2)})  # its epoch is not booked yet
    half = state.weights_file(4).with_name(".tmp-4.safetensors-0a")
    half.write_bytes(b"half")
    with book.change("pin") as server:
        server.leases[server.epochs.pin(1, 60.0, 0.0).id] = 60.0
    assert state.load_weights(3)["a"].tolist() == [1, 1]
    assert half.exists()
    book.close()
    KeptBook(state, booked=lambda what: None).close()
    assert not half.exists()  # who wrote it is dead


def test_a_state_that_cannot_be_written_says_so_and_cleaning_up_undoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(of_weights(1))
    state.save_weights(1, {"a": torch.zeros(2)})
    book = KeptBook(state, booked=lambda what: None)

    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(StateUnusable, match="read-only"):
            state.tidy(of_weights(1))
        with book.change("switch") as server:
            server.remember_switch("token", 1)
    assert state.load(now=0.0).switches == {"token": 1}
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StateUnusable, match="read-only"), book.change("switch") as server:
            server.remember_switch("more", 2)
        with pytest.raises(StateUnusable, match="read-only"):
            state.save_weights(2, {"a": torch.zeros(2)})
    assert book.copied().switches == {"token": 1}


def test_a_repeated_call_for_a_pin_gets_the_same_one_over_a_restart(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(of_weights(1))
    state.save_weights(1, {"a": torch.zeros(2)})
    book = KeptBook(state, booked=lambda what: None)
    with book.change("pin") as server:
        first = server.pin("token", None, 60.0, 0.0)
    book.close()
    book = KeptBook(state, booked=lambda what: None)
    with book.change("pin") as server:
        assert server.pin("token", None, 60.0, 1.0).id == first.id
        assert server.pin("another", None, 60.0, 1.0).id != first.id
    with book.change("unpin") as server:
        server.epochs.unpin(first.id)
        assert server.pin("token", None, 60.0, 2.0).id > first.id  # that one ended
    book.close()


def test_a_pin_whose_closing_was_lost_can_be_closed_again() -> None:
    answers = [CoordinatorLost("away"), None]
    asked: list[tuple[object, ...]] = []

    class Away:
        def call(self, method: str, *arguments: object) -> None:
            asked.append((method, *arguments))
            if (answer := answers.pop(0)) is not None:
                raise answer

    pin = RayPin(Away(), 3, 7)  # type: ignore[arg-type]
    with pytest.raises(CoordinatorLost):
        pin.close()
    pin.close()
    pin.close()
    assert asked == [("unpin", 3)] * 2


def kept(state: StateDirectory) -> tuple[int | None, list[float]]:
    """(the live epoch, its weights), of what a start without weights goes on from."""
    book = state.before().epochs
    assert book.live is not None
    return book.live, state.load_weights(book.plans[book.live].weights_id)["a"].tolist()


@pytest.mark.parametrize("swept", [False, True])
def test_a_start_that_fails_leaves_the_state_that_was_there(tmp_path: Path, swept: bool) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(of_weights(1))
    state.save_weights(1, {"a": torch.ones(2)})
    for _ in range(2):  # the second goes on where the first was killed
        before = state.before().epochs
        begun = EpochBook(last_epoch=before.last_epoch, last_weights=before.last_weights)
        state.create(ServerBook(epochs=begun))
        book = KeptBook(state, booked=lambda what: None)
        number = book.copied().epochs.last_weights + 1
        state.save_weights(number, {"a": torch.zeros(2)})
        with book.change("stage") as server:
            plan = server.epochs.begin(encoder_step=1, new_weights=True, content_version="v")
        assert plan.weights_id == number
        with book.change("settle") as server:
            server.epochs.fail(plan.epoch, "no room")
        assert kept(state) == (1, [1, 1])
        book.close()
        if swept:
            state.abandon(keep_live=False)
            assert kept(state) == (1, [1, 1])
            assert [file.name for file in (state.path / "weights").iterdir()] == ["1.safetensors"]
            assert state.load(now=0.0) == of_weights(1)


def test_the_first_live_epoch_of_a_start_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    state.create(of_weights(1))
    state.save_weights(1, {"a": torch.ones(2)})
    before = state.before().epochs
    begun = EpochBook(last_epoch=before.last_epoch, last_weights=before.last_weights)
    state.create(ServerBook(epochs=begun))
    book = KeptBook(state, booked=lambda what: None)
    state.save_weights(2, {"a": torch.zeros(2)})
    with book.change("stage") as server:
        server.epochs.begin(encoder_step=1, new_weights=True, content_version="v")
    with book.change("activate") as server:
        server.epochs.seal([receipt(0, epoch=2)])
        server.epochs.activate(2)
    book.close()
    state.abandon(keep_live=True)
    assert kept(state) == (2, [0, 0])
    assert [file.name for file in (state.path / "weights").iterdir()] == ["2.safetensors"]
    state.abandon(keep_live=False)
    assert not state.path.exists()


def test_a_state_is_for_its_owners_eyes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = StateDirectory(tmp_path / "servers" / "a")
        with state.locked():
            state.create(of_weights(1))
            state.save_weights(1, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in state.path.rglob("*")}
    assert state.path.stat().st_mode & 0o777 == 0o700
    assert modes == {
        "weights": 0o700,
        "1.safetensors": 0o600,
        "book.json": 0o600,
        "secret": 0o600,
        "lock": 0o600,
    }


def test_a_book_keeps_only_the_newest_failures_and_successors_that_can_be_asked_for() -> None:
    book = of_weights(1)
    for _ in range(40):
        failed = book.epochs.begin(encoder_step=1, new_weights=True, content_version="v")
        book.epochs.fail(failed.epoch, f"reason {failed.epoch}")
    asked = book.epochs.begin(encoder_step=1, new_weights=True, content_version="v").epoch
    instead = book.epochs.begin(encoder_step=1, new_weights=True, content_version="v").epoch
    book.successors[asked] = instead
    book.tidy()
    assert book.epochs.failures == {e: f"reason {e}" for e in range(10, 42)}
    assert sorted(book.epochs.plans) == [1, *range(10, 42), asked, instead]
    book.epochs.release(asked)
    book.tidy()
    assert instead not in book.epochs.plans
    assert book.successors == {}


def test_one_coordinator_holds_a_state_directory(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "servers" / "a")
    with state.locked(), pytest.raises(MemoryServerError, match="runs already"):
        StateDirectory(tmp_path / "servers" / "a").locked().__enter__()
    state.remove()
    assert not (tmp_path / "servers").exists()


def test_names() -> None:
    assert memory_of(shard_name("my-shard", 3, 1)) == "my-shard"
    assert memory_of("my-shard") == "my-shard"


def test_percentiles_are_limits_of_buckets() -> None:
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    assert latency(counts, 0.0).p50_ms is None
    counts[1], counts[4], counts[-1] = 90, 8, 2
    found = latency(counts, 50.0)
    assert (found.count, found.mean_ms) == (100, 500.0)
    assert (found.p50_ms, found.p95_ms) == (1.0, 10.0)
    assert found.p99_ms is None  # beyond the last bucket


class Broken:
    """A shard that could not build what it is asked for."""

    shard = 3

    def search(self, *arguments: object, **settings: object) -> ShardReply:
        raise RefreshFailed("the file is damaged")

    entries = search


def test_a_shard_that_starts_never_denies_what_all_vouched_for() -> None:
    restored = RestoredShard(Broken())  # type: ignore[arg-type]
    queries = torch.zeros(1, 8)
    for ask in (lambda: restored.search(queries, 1, epoch=9), lambda: restored.entries([1])):
        with pytest.raises(ShardRestoring, match="not read its orders"):
            ask()
    restored.joined(frozenset({5}))
    for epoch in (5, None):
        with pytest.raises(ShardRestoring, match="cannot restore: the file is damaged"):
            restored.search(queries, 1, epoch=epoch)
    with pytest.raises(RefreshFailed, match="the file is damaged"):
        restored.search(queries, 1, epoch=6)


def test_a_sample_of_latencies_keeps_the_rare_ones() -> None:
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    counts[0], counts[5], counts[-1] = 10_000, 100, 1
    sample = latency_sample(counts, 200)
    assert 200 <= len(sample) <= 203
    assert sample.count(LATENCY_BUCKETS_S[5]) == 2
    assert max(sample) > LATENCY_BUCKETS_S[-1]
    assert latency_sample([3] + [0] * len(LATENCY_BUCKETS_S), 200) == [LATENCY_BUCKETS_S[0]] * 3


def test_a_shard_goes_on_trying_to_restore_what_all_vouched_for(tmp_path: Path) -> None:
    entries = toy_entries(range(20))
    store = toy_store(tmp_path / "store", entries)
    tries: list[int] = []

    def load(weights_id: int) -> Mapping[str, torch.Tensor]:
        tries.append(weights_id)
        if len(tries) < 3:
            raise OSError("the disk is away")
        return toy_weights(weights_id)

    shard = Shard(store.path, shards=1, shard=0, encoder=toy_factory)
    restored = RestoredShard(shard)
    follower = Follower(shard, restored, load)
    plan = EpochPlan(epoch=4, content_version=store.head(), encoder_step=0, weights_id=1)
    queries = toy_queries(2)

    def settled() -> str:
        while (state := shard.status(4).state) == "encoding":
            time.sleep(0.01)
        return state

    follower.follow(Orders(revision=1, epochs=(Order(plan=plan, sealed=True),), live=4))
    assert settled() == "failed"
    with pytest.raises(ShardRestoring, match="the disk is away"):
        restored.search(queries, 3)
    for now, state, tried in [
        (100.0, "failed", 1),
        (100.5, "failed", 1),
        (101.0, "failed", 2),
        (102.9, "failed", 2),  # the second pause is longer
        (103.0, "sealed", 3),
        (200.0, "sealed", 3),
    ]:
        follower.restore_again(now)
        assert (settled(), len(tries)) == (state, tried)
    assert restored.search(queries, 3).ids.tolist() == expected_ids(
        entries, toy_weights(1), queries, 3
    )
    # Between two tries a shard does not hold the epoch: that is no reason to deny it.
    shard.release(4)
    with pytest.raises(ShardRestoring, match="restores again"):
        restored.search(queries, 3, epoch=4)
    shard.close()


def test_an_actor_comes_up_when_what_hindered_it_is_gone() -> None:
    failures = [PermissionError("no right"), ValueError("bad"), RuntimeError("odd")]
    released = threading.Semaphore(1)

    def begin() -> None:
        released.acquire()
        if failures:
            raise failures.pop(0)

    up = ComingUp(begin, "the shard", again_after_s=0.001)
    with pytest.raises(MemoryServerError, match="the shard cannot start: PermissionError"):
        up.check()
    released.release(3)
    deadline = time.monotonic() + 30.0
    while not up.is_up:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    up.check()
