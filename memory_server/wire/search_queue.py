"""The bounded queue of a shard's searches, and the one thread that answers them, joined."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memory_server.errors import MemoryServerError, Overloaded, ShardRestoring
from memory_server.replies import ShardReply
from memory_server.wire.joined_requests import Waiting, joined, split_again, take_joinable

log = logging.getLogger(__name__)

RESTORING_PAUSE_S = 0.02  # a search for an epoch that is being built again is tried this often


class Searchable(Protocol):
    """The part of a shard that is needed here."""

    shard: int

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        exact: bool = False,
        domains: Collection[str] = (),
    ) -> ShardReply: ...


Answer = Callable[[Waiting, ShardReply | Exception], None]


@dataclass(frozen=True, kw_only=True)
class QueueCounts:
    """`length` and `peak` in requests; `searches` of the shard, of which `joined` answered several
    requests."""

    length: int
    peak: int
    searches: int
    joined: int


class SearchQueue:
    """Answers searches in the order of their arrival, apart from those that can be joined.

    A search for an epoch that its shard is building again after a restart is put aside, not waited
    for, so that searches of other epochs pass it.
    """

    def __init__(
        self,
        shard: Searchable,
        *,
        limit: int,
        max_rows: int,
        answer: Answer,
        idle: Callable[[float | None], None] | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """Answer nothing before `start`.

        Args:
            limit: searches that may wait. max_rows: queries of several that are joined.
            answer: called from the queue's thread, once per request.
            idle: what that thread does for so many seconds (None: for ever) while nothing waits; it
                may `put`. By default it sleeps. wake: ends `idle`.
        """
        self._shard = shard
        self._limit = limit
        self._max_rows = max_rows
        self._answer = answer
        self._changed = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self._aside: list[Waiting] = []
        self._try_again_at = 0.0
        self._peak = self._searches = self._joined = 0
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, name=f"search-shard-{shard.shard}", daemon=True
        )
        self._idle = self._sleep if idle is None else idle
        self._wake = wake
        self.busy_since: float | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def put(self, waiting: Waiting) -> None:
        """Add a search. Raises Overloaded: as many as are allowed wait already."""
        with self._changed:
            length = len(self._queue) + len(self._aside)
            if length >= self._limit:
                raise Overloaded(
                    f"shard {self._shard.shard} is overloaded: {length} searches wait, "
                    f"{self._limit} may; ask again later, or add replicas or shards"
                )
            self._queue.append(waiting)
            self._peak = max(self._peak, length + 1)
            self._changed.notify()
        self._end_idling()

    def counts(self) -> QueueCounts:
        with self._changed:
            return QueueCounts(
                length=len(self._queue) + len(self._aside),
                peak=self._peak,
                searches=self._searches,
                joined=self._joined,
            )

    def close(self) -> None:
        """Stop after the search that is running; what waits is not answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._end_idling()
        self._thread.join()

    def _sleep(self, timeout_s: float | None) -> None:
        with self._changed:
            if not self._queue and not self._closed:
                self._changed.wait(timeout_s)

    def _end_idling(self) -> None:
        if self._wake is not None and threading.current_thread() is not self._thread:
            self._wake()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            alive = []
            now = time.monotonic()
            for waiting in batch:
                if now < waiting.deadline:
                    alive.append(waiting)
                else:
                    self._answer(waiting, _too_late(waiting, now))
            if alive:
                self.busy_since = now
                self._search(alive)
                self.busy_since = None

    def _next(self) -> list[Waiting] | None:
        """Wait for work. None: closed."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                now = time.monotonic()
                if self._aside and now >= self._try_again_at:
                    self._queue.extend(self._aside)
                    self._aside.clear()
                if self._queue:
                    return take_joinable(self._queue, self._max_rows)
                timeout_s = self._try_again_at - now if self._aside else None
            self._idle(timeout_s)

    def _search(self, batch: Sequence[Waiting]) -> None:
        try:
            replies = self._searched(batch)
        except Exception as error:  # what fails for one must not end the thread
            if len(batch) > 1:
                for waiting in batch:  # one bad request must not fail its neighbours
                    self._search([waiting])
            elif isinstance(error, ShardRestoring) and time.monotonic() < batch[0].patient_until:
                self._put_aside(batch[0])
            else:
                if not isinstance(error, MemoryServerError | ValueError | TimeoutError):
                    log.exception("shard %d: a search failed", self._shard.shard)
                self._answer(batch[0], error)
            return
        for waiting, reply in zip(batch, replies, strict=True):
            self._answer(waiting, reply)

    def _searched(self, batch: Sequence[Waiting]) -> list[ShardReply]:
        requests = [waiting.request for waiting in batch]
        queries, k, excluded = joined(requests)
        reply = self._shard.search(
            torch.from_numpy(queries),
            k,
            None if excluded is None else torch.from_numpy(excluded),
            epoch=batch[0].preamble.epoch,
            exact=requests[0].exact,
            domains=requests[0].domains,
        )
        with self._changed:
            self._searches += 1
            self._joined += len(batch) > 1
        return split_again(reply, requests)

    def _put_aside(self, waiting: Waiting) -> None:
        with self._changed:
            self._aside.append(waiting)
            self._try_again_at = time.monotonic() + RESTORING_PAUSE_S


def _too_late(waiting: Waiting, now: float) -> TimeoutError:
    return TimeoutError(
        f"the search waited {now - waiting.arrived:.3f} s in the queue of shard "
        f"{waiting.preamble.shard}, longer than its deadline allows"
    )
