"""Searches that wait together are answered together, and each gets what it would get alone."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_server.errors import Overloaded, ShardRestoring, UnknownEpoch
from memory_server.replies import ShardReply
from memory_server.shard.shard import Shard
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.joined_requests import Waiting
from memory_server.wire.search_messages import SearchRequest
from memory_server.wire.search_queue import SearchQueue
from tests.memory_server.support_search import EchoShard, numbered, sealed_shards, stage
from tests.toy_memory import toy_entries, toy_queries, toy_store


class Answers:
    """Collects what a queue answers; each request is known by its number."""

    def __init__(self) -> None:
        self.of: dict[int, ShardReply | Exception] = {}
        self._changed = threading.Condition()

    def __call__(self, waiting: Waiting, answer: ShardReply | Exception) -> None:
        with self._changed:
            assert waiting.preamble.number not in self.of, "answered twice"
            self.of[waiting.preamble.number] = answer
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of) >= count, 20)


class Gated:
    """A shard that is held up until its gate opens, and counts its searches."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.shard = shard.shard
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.searches = 0

    def search(self, *args: object, **kwargs: object) -> ShardReply:
        self.entered.set()
        assert self.gate.wait(20)
        self.searches += 1
        return self._shard.search(*args, **kwargs)  # type: ignore[arg-type]


def waiting(
    number: int,
    queries: torch.Tensor,
    k: int = 3,
    *,
    exclude: torch.Tensor | None = None,
    epoch: int | None = None,
    exact: bool = False,
    timeout_s: float = 60.0,
    wait_s: float = 0.0,
    domains: tuple[str, ...] = (),
) -> Waiting:
    now = time.monotonic()
    return Waiting(
        sender=b"test",
        preamble=Preamble(kind=Kind.SEARCH, shard=0, number=number, epoch=epoch),
        request=SearchRequest(
            queries=queries.numpy(),
            k=k,
            exclude_doc_ids=None if exclude is None else exclude.numpy(),
            exact=exact,
            domains=domains,
        ),
        arrived=now,
        deadline=now + timeout_s,
        patient_until=now + wait_s,
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    """Two epochs of 50 entries with different keys; the first is live."""
    path = tmp_path_factory.mktemp("queue") / "s"
    store = toy_store(path, toy_entries(range(50)))
    (made,) = sealed_shards(path, 1)
    stage(made, 2, store.head())
    yield made
    made.close()


REQUEST = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 4),
        "k": st.sampled_from([1, 2, 5, 60]),
        "exclude": st.none() | st.integers(0, 20),
        "epoch": st.sampled_from([None, None, 1, 2]),
        "exact": st.booleans(),
    }
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(requests=st.lists(REQUEST, min_size=2, max_size=9), max_rows=st.integers(1, 12))
def test_joined_searches_are_answered_as_if_alone(
    shard: Shard, requests: list[dict[str, int]], max_rows: int
) -> None:
    gated, answers = Gated(shard), Answers()
    queue = SearchQueue(gated, limit=100, max_rows=max_rows, answer=answers)
    queue.start()
    try:
        queue.put(waiting(-1, toy_queries(1)))
        assert gated.entered.wait(20)
        given_requests = []
        for number, r in enumerate(requests):
            queries = toy_queries(r["rows"], seed=number)
            exclude = None if r["exclude"] is None else torch.full((r["rows"],), r["exclude"])
            given_requests.append((queries, exclude))
            queue.put(
                waiting(
                    number, queries, r["k"],
                    exclude=exclude, epoch=r["epoch"], exact=bool(r["exact"]),
                )
            )  # fmt: skip
        gated.gate.set()
        answers.wait(len(requests) + 1)
    finally:
        queue.close()
    for number, r in enumerate(requests):
        queries, exclude = given_requests[number]
        alone = shard.search(queries, r["k"], exclude, epoch=r["epoch"], exact=bool(r["exact"]))
        reply = answers.of[number]
        assert isinstance(reply, ShardReply)
        assert (reply.epoch, reply.encoder_step) == (alone.epoch, alone.encoder_step)
        for field in ("ids", "scores", "doc_ids", "tokens"):
            assert np.array_equal(getattr(reply, field), getattr(alone, field)), field
    alike = {(r["epoch"], r["exact"], r["k"]) for r in requests}
    if max_rows == 12 and sum(r["rows"] for r in requests) <= 12:
        assert gated.searches - 1 <= len(alike)
    assert queue.counts().length == 0


def held_up(
    shard: EchoShard, *, limit: int = 100, max_rows: int = 100
) -> tuple[SearchQueue, Answers]:
    """A queue whose thread is inside a first search, number -1, until the gate opens."""
    answers = Answers()
    shard.gate.clear()
    queue = SearchQueue(shard, limit=limit, max_rows=max_rows, answer=answers)
    queue.start()
    queue.put(waiting(-1, numbered(9)))
    assert shard.asked.acquire(timeout=20)
    return queue, answers


def test_a_bad_request_does_not_fail_those_it_is_joined_with() -> None:
    shard = EchoShard()
    queue, answers = held_up(shard)
    queue.put(waiting(0, numbered(4)))
    queue.put(waiting(1, torch.full((2, 4), torch.nan)))
    queue.put(waiting(2, numbered(6, 7)))
    shard.gate.set()
    answers.wait(4)
    queue.close()
    assert isinstance(answers.of[1], ValueError)
    for number, ids in ((0, [400]), (2, [600, 700])):
        reply = answers.of[number]
        assert isinstance(reply, ShardReply)
        assert reply.ids[:, 0].tolist() == ids


def test_one_full_queue_turns_away_and_says_how_full_it_is() -> None:
    shard = EchoShard()
    queue, answers = held_up(shard, limit=2)
    queue.put(waiting(0, numbered(1)))
    queue.put(waiting(1, numbered(2)))
    with pytest.raises(Overloaded, match="2 searches wait, 2 may"):
        queue.put(waiting(2, numbered(3)))
    shard.gate.set()
    answers.wait(3)
    queue.put(waiting(2, numbered(3)))
    answers.wait(4)
    queue.close()
    assert queue.counts().peak == 2


def test_a_search_whose_deadline_passed_in_the_queue_costs_no_search() -> None:
    shard = EchoShard()
    queue, answers = held_up(shard)
    queue.put(waiting(0, numbered(1), timeout_s=0.0))
    queue.put(waiting(1, numbered(2)))
    shard.gate.set()
    answers.wait(3)
    queue.close()
    assert isinstance(answers.of[0], TimeoutError)
    assert shard.batches == [1, 1]


def test_a_wide_search_is_not_joined_with_narrow_ones() -> None:
    shard = EchoShard()
    queue, answers = held_up(shard)
    queue.put(waiting(0, numbered(1), 1000))
    queue.put(waiting(1, numbered(2, 3), 5))
    queue.put(waiting(2, numbered(4, 5), 3))
    shard.gate.set()
    answers.wait(4)
    queue.close()
    assert shard.batches == [1, 1, 4]


class Restoring(EchoShard):
    """Builds epoch 7 again until told that it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.restored = threading.Event()

    def search(self, *args: object, **kwargs: object) -> ShardReply:
        if kwargs.get("epoch") == 7 and not self.restored.is_set():
            raise ShardRestoring("soon")
        if kwargs.get("epoch") == 8:
            raise UnknownEpoch("8")
        return super().search(*args, **kwargs)  # type: ignore[arg-type]


def test_waiting_for_an_epoch_that_is_built_again_holds_nobody_up() -> None:
    shard, answers = Restoring(), Answers()
    queue = SearchQueue(shard, limit=100, max_rows=100, answer=answers)
    queue.start()
    queue.put(waiting(0, numbered(1), epoch=7, wait_s=20))
    queue.put(waiting(1, numbered(1), epoch=7, wait_s=0))
    queue.put(waiting(2, numbered(1), epoch=8, wait_s=20))
    queue.put(waiting(3, numbered(1)))
    answers.wait(3)
    assert isinstance(answers.of[1], ShardRestoring)
    assert isinstance(answers.of[2], UnknownEpoch)
    assert isinstance(answers.of[3], ShardReply)
    assert queue.counts().length == 1
    shard.restored.set()
    answers.wait(4)
    queue.close()
    reply = answers.of[0]
    assert isinstance(reply, ShardReply)
    assert reply.epoch == 7
