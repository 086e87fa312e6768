"""What a coordinator books and answers, with shards that are played: no Ray, no processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memory_server.actors import coordinator as module
from memory_server.actors.calls import NoAnswer, Replicas
from memory_server.actors.coordinator import Coordinator
from memory_server.actors.names import Address, Layout, pack_weights
from memory_server.actors.orders import Need, Orders
from memory_server.actors.server_book import ServerBook
from memory_server.actors.state import StateDirectory
from memory_server.errors import (
    LiveEpochChanged,
    MemoryServerError,
    RefreshFailed,
    ShardLost,
    StateNotFound,
    UnknownEpoch,
)
from memory_server.index.base import IndexSettings
from memory_server.shard.epochs import Receipt
from memory_server.shard.held_epoch import ShardStatus
from tests.toy_memory import toy_entries, toy_store, toy_weights

ROWS = 30
WAIT_S = 10.0


class PlayedReplicas:
    """One shard of one replica, that seals everything at once. `silent`: calls that it ignores."""

    def __init__(self, layout: Layout) -> None:
        self.addresses = layout.addresses
        self.orders: Orders | None = None
        self.silent: set[str] = set()
        self.asked: list[str] = []

    def ask(
        self,
        method: str,
        *arguments: Any,
        timeout_s: float,
        addresses: Sequence[Address] | None = None,
    ) -> dict[Address, Any]:
        if addresses is not None and not addresses:
            return {}
        self.asked.append(method)
        if method in self.silent:
            return {(0, 0): NoAnswer(method)}
        answer: Any = {"ping": 1, "need": Need(place="here", bytes=0, free=0)}.get(method)
        if method == "status":
            answer = self.status(arguments[0])
        return {(0, 0): answer}

    def status(self, epoch: int) -> Any:
        plans = [o.plan for o in self.orders.epochs] if self.orders else []
        found = [plan for plan in plans if plan.epoch == epoch]
        if not found:
            return UnknownEpoch("no news yet")
        receipt = Receipt(
            epoch=epoch,
            shard=0,
            encoder_step=found[0].encoder_step,
            content_version=found[0].content_version,
            rows=ROWS,
            live_rows=ROWS,
            key_width=8,
            key_checksum=1,
            layout=1,
            encoded_rows=ROWS,
            bytes={},
            seconds=0.0,
        )
        return ShardStatus(
            state="sealed", done=ROWS, total=ROWS, error=None, receipt=receipt, seconds=0.0
        )

    def tell(self, orders: Orders) -> None:
        self.orders = orders

    def wait_until_followed(self, orders: Orders, wait_s: float, *, patient: bool) -> None:
        self.tell(orders)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    store = toy_store(tmp_path / "store", toy_entries(range(ROWS)))
    StateDirectory(tmp_path / "state").create(ServerBook())
    return Layout(
        name="played",
        shards=1,
        replicas=1,
        index=IndexSettings(),
        meta=store.meta,
        store_path=str(store.path),
        state_dir=str(tmp_path / "state"),
    )


Restart = Callable[[], Coordinator]


@pytest.fixture
def restart(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restart]:
    """Ends the coordinator that there is, and begins one on the same state. None of them minds its
    book by itself."""
    monkeypatch.setattr(module, "Replicas", PlayedReplicas)
    monkeypatch.setattr(Coordinator, "_mind", lambda self: None)
    there: list[Coordinator] = []

    def begin() -> Coordinator:
        while there:
            there.pop()._book.close()
        there.append(Coordinator(layout))
        return there[0]

    yield begin
    there[0]._book.close()


def staged(leader: Coordinator, seed: int | None) -> int:
    """A sealed refresh; without a seed, an edit."""
    weights = None if seed is None else pack_weights(toy_weights(seed))
    begins = not leader._book.copied().epochs.plans
    version = leader._stager._store.head() if seed is None or begins else None
    epoch = leader.stage(f"stage-{seed}-{time.monotonic()}", seed or 0, weights, version)
    assert leader.staging(epoch).state == "sealed"
    return epoch


def held(leader: Coordinator) -> list[int]:
    return [status.epoch for status in leader.held()]


def moved_on(leader: Coordinator) -> tuple[int, int, int]:
    """(an edit whose weights are not live any more, what was staged instead, the live epoch)"""
    first = staged(leader, 1)
    assert leader.activate(first, None, WAIT_S, "first") == (True, first)
    edit = staged(leader, None)
    refresh = staged(leader, 2)
    assert leader.activate(refresh, first, WAIT_S, "refresh") == (True, refresh)
    leader.release(first, WAIT_S)
    switched, instead = leader.activate(edit, refresh, WAIT_S, "edit")
    assert not switched
    assert leader.staging(instead).state == "sealed"
    return edit, instead, refresh


def test_a_switch_whose_answer_was_lost_is_told_again_and_not_done_again(restart: Restart) -> None:
    leader = restart()
    edit, instead, refresh = moved_on(leader)
    assert leader.activate(edit, refresh, WAIT_S, "edit") == (True, instead)
    leader = restart()
    assert leader.activate(edit, refresh, WAIT_S, "edit") == (True, instead)
    # Nor does a late repetition undo what someone else did.
    assert leader.activate(refresh, None, WAIT_S, "back")[0]
    live = leader.info().epoch
    assert live != instead
    assert leader.activate(edit, refresh, WAIT_S, "edit") == (True, instead)
    assert leader.info().epoch == live


def test_what_was_staged_for_a_refused_switch_goes(restart: Restart) -> None:
    leader = restart()
    edit, instead, refresh = moved_on(leader)
    other = staged(leader, 3)
    assert leader.activate(other, refresh, WAIT_S, "someone else's") == (True, other)
    with pytest.raises(LiveEpochChanged):
        leader.activate(edit, refresh, WAIT_S, "edit")
    assert held(leader) == sorted([edit, refresh, other])
    assert instead not in held(restart())


def test_what_was_staged_instead_goes_with_what_it_was_staged_for(restart: Restart) -> None:
    leader = restart()
    edit, _, refresh = moved_on(leader)
    leader.release(edit, WAIT_S)
    assert held(leader) == [refresh]


def test_what_was_staged_for_a_client_that_died_goes_after_a_while(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = restart()
    edit, instead, refresh = moved_on(leader)
    leader._mind_once()
    assert held(leader) == sorted([edit, instead, refresh])
    monkeypatch.setattr(module, "ABANDONED_S", 0.0)
    leader._mind_once()
    assert held(leader) == sorted([edit, refresh])


def test_a_replica_that_lives_and_does_not_say_what_it_needs_is_not_taken_for_room(
    restart: Restart,
) -> None:
    leader = restart()
    replicas: Any = leader._replicas
    replicas.silent = {"need"}
    with pytest.raises(RefreshFailed, match="replica 0 of shard 0 lives but did not say"):
        staged(leader, 1)
    assert held(leader) == []
    replicas.silent = {"need", "ping"}  # it is starting: what it lacks it says when it stages
    staged(leader, 1)


def test_a_coordinator_that_cannot_start_says_why_and_tries_again(
    layout: Layout, restart: Restart
) -> None:
    book = Path(layout.state_dir) / "book.json"
    book.rename(book.with_suffix(".away"))
    leader = restart()
    with pytest.raises(StateNotFound):
        leader.ping()
    book.with_suffix(".away").rename(book)
    deadline = time.monotonic() + 30.0
    while not leader._up.is_up:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert held(leader) == []


class Scripted(Replicas):
    """Two shards of two replicas, of which each answers an order as it is told to. One that is
    ended is away until it is asked once more, and then follows."""

    def __init__(
        self, layout: Layout, answers: dict[Address, Any], *, can_be_ended: bool = True
    ) -> None:
        super().__init__(layout)
        self._answers = answers
        self._can_be_ended = can_be_ended
        self.ended: list[Address] = []

    def ask(
        self,
        method: str,
        *arguments: Any,
        timeout_s: float,
        addresses: Sequence[Address] | None = None,
    ) -> dict[Address, Any]:
        asked = self.addresses if addresses is None else addresses
        return {a: self._answers[a] for a in asked if a in self._answers}

    def end(self, address: Address) -> None:
        self.ended.append(address)
        if self._can_be_ended:
            del self._answers[address]


ORDERS = Orders(revision=7, epochs=(), live=None)


@pytest.mark.parametrize("silence", [NoAnswer("silent"), MemoryServerError("no disk"), None])
def test_a_switch_leaves_no_replica_that_answers_from_before(
    layout: Layout, silence: Exception | None
) -> None:
    two = Layout(**{**vars(layout), "shards": 2, "replicas": 2})
    answers: dict[Address, Any] = {(0, 0): 7, (0, 1): silence, (1, 0): 7, (1, 1): 7}
    if silence is None:
        del answers[0, 1]  # dead: it reads the orders before it answers again
    replicas = Scripted(two, answers)
    replicas.wait_until_followed(ORDERS, 0.2, patient=True)
    assert replicas.ended == ([] if silence is None else [(0, 1)])
    assert replicas._behind(ORDERS) == [(0, 1)]  # it is told until it follows


def test_a_replica_that_can_be_neither_reached_nor_ended_is_named(layout: Layout) -> None:
    two = Layout(**{**vars(layout), "shards": 2, "replicas": 2})
    answers: dict[Address, Any] = {(0, 0): 7, (0, 1): NoAnswer("x"), (1, 0): 7, (1, 1): 7}
    replicas = Scripted(two, answers, can_be_ended=False)
    with pytest.raises(ShardLost, match=r"\(0, 1\).* neither follow nor could be ended"):
        replicas.wait_until_followed(ORDERS, 0.2, patient=True)


def test_what_is_released_late_harms_nobody(layout: Layout) -> None:
    two = Layout(**{**vars(layout), "shards": 2, "replicas": 2})
    answers: dict[Address, Any] = {(0, 0): 7, (0, 1): NoAnswer("x"), (1, 0): 7, (1, 1): 7}
    replicas = Scripted(two, answers)
    replicas.wait_until_followed(ORDERS, 0.2, patient=False)
    assert replicas.ended == []


def test_a_shard_of_which_no_replica_follows_is_lost_or_says_why(layout: Layout) -> None:
    two = Layout(**{**vars(layout), "shards": 2, "replicas": 2})
    answers: dict[Address, Any] = {(0, 0): 7, (0, 1): 7, (1, 0): NoAnswer("a")}
    with pytest.raises(ShardLost, match="shard 1 of played did not follow"):
        Scripted(two, answers).wait_until_followed(ORDERS, 0.2, patient=True)
    answers[1, 1] = MemoryServerError("no disk")
    with pytest.raises(MemoryServerError, match="no disk"):
        Scripted(two, answers).wait_until_followed(ORDERS, 0.2, patient=True)
