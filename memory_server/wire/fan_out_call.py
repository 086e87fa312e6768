"""One question to all shards: ask, hedge, ask again after a loss, and say who did not answer.

Runs on the thread that asks. What is known of the replicas is shared by all threads (`Links`); the
sockets are the thread's own for as long as the call lasts.
"""

import hmac
import random
import time
from collections.abc import Iterable
from typing import Any

from memory_server.api import LostShardPolicy
from memory_server.errors import (
    AccessRefused,
    BadMessage,
    EpochNotSealed,
    Overloaded,
    RefreshFailed,
    ShardLost,
    ShardRestoring,
    UnknownEpoch,
)
from memory_server.wire.fan_out_asking import LOOK_AGAIN_S, Asker
from memory_server.wire.fan_out_tasks import Attempt, Links, Question, Task
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.messages import ERROR_TYPES, unpack_error
from memory_server.wire.search_client import Event, Lane

LOOK_AGAIN_SHARE = 0.1  # of the time that an actor took so far: many threads may wait for them
RETRY_PAUSE_S = 0.05
LONGEST_BACKOFF_S = 0.5
REFUSALS_AT_MOST = 3


class Call:
    """Asks until every task is answered, or is missing. Not for two threads."""

    def __init__(
        self,
        links: Links,
        lane: Lane,
        question: Question,
        *,
        policy: LostShardPolicy,
        deadline: float,
    ) -> None:
        self._links = links
        self._lane = lane
        self._question = question
        self._policy = policy
        self._deadline = deadline
        self._asker = Asker(links, lane, question, policy=policy, deadline=deadline)
        self._attempts = self._asker.attempts
        self._tasks: list[Task] = []

    def ask(self, tasks: Iterable[Task]) -> list[Task]:
        """Blocks until none is open, the deadline at the latest.

        Returns:
            The tasks; a relay that failed is replaced by its shards' own.

        Raises:
            Whatever a shard raised, Overloaded, AccessRefused.
        """
        self._tasks = list(tasks)
        try:
            while any(task.open for task in self._tasks):
                now = time.monotonic()
                if now >= self._deadline:
                    self._give_up()
                    break
                wait_s = self._start_what_is_due(now)
                for event in self._lane.poll(wait_s):
                    self._handle(event)
                self._take_actors_replies()
        finally:
            now = time.monotonic()
            for number in list(self._attempts):
                self._asker.end(number, now)
        return self._tasks

    def _start_what_is_due(self, now: float) -> float:
        """Send what is to be sent now; returns how long nothing else will be."""
        next_at = self._deadline
        for task in list(self._tasks):
            if not task.open:
                continue
            if task.relay and now >= task.relay_until:
                self._ask_directly(task)
            elif not task.attempts and now >= task.retry_at:
                self._start(task, now)
            elif task.attempts and now >= task.hedge_at:
                self._asker.hedge(task, now)
        for task in self._tasks:
            if task.open:
                due = min(task.hedge_at, task.relay_until) if task.attempts else task.retry_at
                next_at = min(next_at, due)
        for attempt in self._attempts.values():
            if attempt.future is not None:
                pause_s = max(LOOK_AGAIN_S, LOOK_AGAIN_SHARE * (now - attempt.sent_at))
                next_at = min(next_at, now + pause_s)
        if not any(task.open for task in self._tasks):
            return 0.0
        return max(0.0, next_at - time.monotonic())

    def _start(self, task: Task, now: float) -> None:
        if not task.relay:
            refusal = self._asker.start(task, now)
            if refusal is not None:
                self._failed(*refusal, now)
        elif not self._asker.start_relay(task, now):
            self._ask_directly(task, failed=False)

    def _ask_directly(self, task: Task, *, failed: bool = True) -> None:
        """Replace a group by its shards: whatever kept it from answering shows up there, if it is
        more than the relay's own trouble."""
        for number in list(task.attempts):
            self._asker.end(number, time.monotonic())
        self._links.counters.add(relays_failed=int(failed))
        at = self._tasks.index(task)
        self._tasks[at : at + 1] = [Task((shard,), task.epoch) for shard in task.shards]

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "lost":
            self._connection_lost(event.address, refused=event.refused, now=now)
            return
        try:
            preamble = Preamble.unpack(event.frames[0])
            if len(event.frames) != 2:
                raise BadMessage("a reply has two frames")
        except BadMessage as error:
            self._distrust(event.address, str(error), now)
            return
        attempt = self._attempts.get(preamble.number)
        if attempt is None or attempt.address != event.address:
            return  # the slower of two replicas, or a call that gave up
        shard = self._links.shards[attempt.shard]
        known = hmac.compare_digest(preamble.proof, self._links.server_proof)
        if not known or preamble.shard != shard:
            attempt.task.refusals += 1
            if attempt.task.refusals >= REFUSALS_AT_MOST:
                raise AccessRefused(
                    f"the server of shard {shard} at {event.address} refused this client, or is "
                    "another memory's; attach to the memory again"
                )
            self._distrust(event.address, "another server has its place", now)
            return
        try:
            if preamble.kind is Kind.ERROR:
                answer: Any = unpack_error(event.frames[1])
            else:
                answer = self._question.decode(event.frames[1], shard)
        except BadMessage as error:
            self._distrust(event.address, f"its reply cannot be read: {error}", now)
            return
        self._answered(preamble.number, attempt, answer, now)

    def _answered(self, number: int, attempt: Attempt, answer: Any, now: float) -> None:
        task, links = attempt.task, self._links
        self._asker.forget(number)
        if attempt.replica is None:
            if isinstance(answer, Exception):
                self._ask_directly(task)
            else:
                links.counters.add(relayed=1)
                links.relay_delay.record(now - attempt.sent_at)
                task.reply = answer
            return
        links.book.answered(attempt.shard, attempt.replica, now - attempt.sent_at, now)
        links.endpoints.answered(attempt.shard, attempt.replica)
        if isinstance(answer, Exception):
            self._failed(attempt, answer, now)
            return
        links.delay.record(now - attempt.sent_at)
        if attempt.hedge:
            links.counters.add(hedges_won=1)
        if task.open:
            task.reply = answer
        for other in list(task.attempts):
            self._asker.end(other, now)

    def _failed(self, attempt: Attempt, error: Exception, now: float) -> None:
        """A replica answered with an error: another one may do better, or time, or nothing."""
        task = attempt.task
        assert attempt.replica is not None
        if not task.open:
            return
        task.reason = str(error)
        task.tried.add(attempt.replica)
        reaches = self._asker.reaches(attempt.shard)
        another = any(
            reach.kind in ("socket", "actor") and replica not in task.tried
            for replica, reach in reaches.items()
        )
        if task.attempts:
            return  # a copy is on its way
        task.retry_at = now
        if isinstance(error, Overloaded):
            self._links.counters.add(overloaded=1, repeated=1)
            task.overloaded = error
            if not another:
                task.tried.clear()
                task.retry_at = now + random.uniform(0.5, 1.0) * task.backoff_s
                task.backoff_s = min(2 * task.backoff_s, LONGEST_BACKOFF_S)
        elif isinstance(error, ShardRestoring):
            self._links.counters.add(repeated=1)
            if not another and self._policy == "degrade":
                task.missing = True
            elif not another:
                task.retry_at = now + RETRY_PAUSE_S
        elif isinstance(error, TimeoutError):
            self._links.counters.add(repeated=1)
            task.retry_at = now + RETRY_PAUSE_S
        elif not (another and isinstance(error, UnknownEpoch | EpochNotSealed | RefreshFailed)):
            raise error

    def _connection_lost(self, address: str, *, refused: bool, now: float) -> None:
        reason = "its connection was refused" if refused else "its connection was lost"
        self._links.counters.add(connections_lost=1)
        for number, attempt in list(self._attempts.items()):
            if attempt.address == address and attempt.future is None:
                self._lose(number, attempt, reason, refused=refused, now=now)

    def _distrust(self, address: str, reason: str, now: float) -> None:
        """Leave a server that does not speak as this memory's do, and look for the right one."""
        self._lane.drop(address)
        for number, attempt in list(self._attempts.items()):
            if attempt.address == address and attempt.future is None:
                self._lose(number, attempt, reason, refused=True, now=now)

    def _lose(
        self, number: int, attempt: Attempt, reason: str, *, refused: bool, now: float
    ) -> None:
        self._asker.forget(number)
        task = attempt.task
        if attempt.replica is None:
            if task in self._tasks:
                self._ask_directly(task)
            return
        self._links.book.lost(attempt.shard, attempt.replica, now)
        self._links.endpoints.lost(
            attempt.shard, attempt.replica, attempt.address, reason, refused=refused
        )
        if task.open and not task.attempts:
            self._links.counters.add(repeated=1)
            task.reason, task.retry_at = reason, now

    def _take_actors_replies(self) -> None:
        for number, attempt in list(self._attempts.items()):
            if attempt.future is None or not attempt.future.done():
                continue
            now = time.monotonic()
            error = attempt.future.exception()
            if error is None:
                self._answered(number, attempt, attempt.future.result(), now)
            elif isinstance(error, ShardLost):
                self._lose(number, attempt, str(error), refused=False, now=now)
                attempt.task.missing = attempt.task.open and not attempt.task.attempts
            elif isinstance(error, Exception) and type(error) in ERROR_TYPES.values():
                self._answered(number, attempt, error, now)
            else:
                reason = f"its actor does not answer ({type(error).__name__}: {error})"
                self._lose(number, attempt, reason, refused=False, now=now)
                if attempt.task.open and not attempt.task.attempts:
                    attempt.task.missing = self._policy == "degrade"
                    attempt.task.retry_at = now + RETRY_PAUSE_S

    def _give_up(self) -> None:
        for task in self._tasks:
            if not task.open:
                continue
            if task.overloaded is not None:
                raise task.overloaded
            task.missing = True
