"""One question to all shards: ask, hedge, ask again after a loss, and say who did not answer.

Runs on the thread that asks. What is known of the replicas is shared by all threads (`Links`); the
sockets are the thread's own for as long as the call lasts.
"""

import hmac
import itertools
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
from memory_server.wire.endpoints import Reach
from memory_server.wire.fan_out_tasks import Attempt, Links, Question, Task
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.messages import ERROR_TYPES, pack_group, unpack_error
from memory_server.wire.search_client import Event, Lane

LOOK_AGAIN_S = 0.002  # while an actor is asked, or a replica's place is being found out
LOOK_AGAIN_SHARE = 0.1  # of the time that an actor took so far: many threads may wait for them
RETRY_PAUSE_S = 0.05
GRACE_S = 0.2  # "degrade" gives a shard that was just lost so long to be found again
LONGEST_BACKOFF_S = 0.5
REFUSALS_AT_MOST = 3
RELAY_SHARE = 0.5  # of the time that is left; then its group is asked directly
# A relay that is so much slower than 95 of 100 were is given up sooner. Its shards, asked
# directly, can be hedged where they have replicas; where they have none, a slow one would only have
# more to do, so that the relay must be slower than a busy shard is.
RELAY_PATIENCE = 3.0
ALONE_AT_LEAST_S = 1.0

_numbers = itertools.count(1)


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
        self._attempts: dict[int, Attempt] = {}
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
                self._end(number, now)
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
                self._hedge(task, now)
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
        if task.relay:
            self._start_relay(task, now)
            return
        shard = task.shards[0]
        reaches = self._reaches(shard)
        usable = [r for r, reach in reaches.items() if reach.kind in ("socket", "actor")]
        if not usable:
            self._nobody_to_ask(task, reaches, now)
            return
        untried = [r for r in usable if r not in task.tried]
        if not untried:
            task.tried.clear()
        replica = self._links.book.choose(shard, untried or usable, now)
        self._send(task, replica, reaches[replica], now)
        others = [r for r in usable if r != replica]
        if others:
            probe = self._links.book.probe(shard, others, now)
            if probe is not None:
                self._send(task, probe, reaches[probe], now)
            task.hedge_at = now + self._links.delay.seconds

    def _nobody_to_ask(self, task: Task, reaches: dict[int, Reach], now: float) -> None:
        reasons = {reach.reason for reach in reaches.values() if reach.reason}
        task.reason = "; ".join(sorted(reasons)) or task.reason
        lost_at = [reach.lost_at for reach in reaches.values()]
        since = max((at for at in lost_at if at is not None), default=now)
        gone = all(reach.kind == "gone" for reach in reaches.values())
        given_up = self._policy == "degrade" and None not in lost_at and now >= since + GRACE_S
        if gone or given_up:
            task.missing = True
        else:
            task.retry_at = now + LOOK_AGAIN_S

    def _hedge(self, task: Task, now: float) -> None:
        task.hedge_at = float("inf")
        asked = {a.replica for a in task.attempts.values()}
        if task.relay or len(asked) != 1:
            return
        (first,) = asked
        assert first is not None
        shard = task.shards[0]
        reaches = self._reaches(shard)
        usable = [r for r, reach in reaches.items() if reach.kind == "socket"]
        other = self._links.book.less_busy(shard, first, usable, now)
        if other is not None:
            self._links.counters.add(hedged=1)
            self._send(task, other, reaches[other], now, hedge=True)

    def _send(
        self, task: Task, replica: int, reach: Reach, now: float, *, hedge: bool = False
    ) -> None:
        shard, number = task.shards[0], next(_numbers)
        left_s = max(0.0, self._deadline - now)
        wait_s = left_s if self._policy == "wait" else 0.0
        attempt = Attempt(task, shard, replica, reach.address, now, hedge)
        self._attempts[number] = task.attempts[number] = attempt
        self._links.book.sent(shard, replica)
        self._links.counters.add(asked=1)
        if reach.kind == "actor":
            self._call_actor(number, attempt, wait_s, left_s, now)
            return
        preamble = self._preamble(self._question.kind, shard, number, task.epoch, left_s, wait_s)
        self._lane.send(reach.address, [preamble, self._question.body])

    def _call_actor(
        self, number: int, attempt: Attempt, wait_s: float, left_s: float, now: float
    ) -> None:
        links, replica = self._links, attempt.replica
        assert links.actor_call is not None
        assert replica is not None
        if not links.actor_slots.acquire(blocking=False):
            self._end(number, now)
            self._failed(attempt, _too_many_by_actor(attempt.shard), now)
            return
        links.counters.add(actor_calls=1)
        arguments = self._question.arguments(attempt.task.epoch, wait_s)
        attempt.future = links.actors.submit(
            links.actor_call, attempt.shard, replica, self._question.method, arguments, left_s
        )
        attempt.future.add_done_callback(lambda _: links.actor_slots.release())

    def _start_relay(self, task: Task, now: float) -> None:
        """Ask one server to ask the group; which one is drawn, so that all take their turn."""
        members = []
        for shard in task.shards:
            reaches = self._reaches(shard)
            sockets = [r for r, reach in reaches.items() if reach.kind == "socket"]
            if not sockets:
                self._ask_directly(task, failed=False)
                return
            replica = self._links.book.choose(shard, sockets, now)
            members.append((self._links.shards[shard], reaches[replica].address))
        at = random.randrange(len(members))
        shard, address, number = task.shards[at], members[at][1], next(_numbers)
        left_s = RELAY_SHARE * (self._deadline - now)
        attempt = Attempt(task, shard, None, address, now)
        self._attempts[number] = task.attempts[number] = attempt
        hedged = all(self._links.replicas[shard] > 1 for shard in task.shards)
        patience_s = max(
            RELAY_PATIENCE * self._links.relay_delay.seconds, 0.0 if hedged else ALONE_AT_LEAST_S
        )
        task.relay_until = now + min(left_s, patience_s)
        self._links.counters.add(asked=1)
        wait_s = left_s if self._policy == "wait" else 0.0
        preamble = self._preamble(Kind.RELAY, shard, number, task.epoch, left_s, wait_s)
        self._lane.send(address, [preamble, self._question.body, pack_group(members)])

    def _ask_directly(self, task: Task, *, failed: bool = True) -> None:
        """Replace a group by its shards: whatever kept it from answering shows up there, if it is
        more than the relay's own trouble."""
        for number in list(task.attempts):
            self._end(number, time.monotonic())
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
        self._forget(number)
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
            self._end(other, now)

    def _failed(self, attempt: Attempt, error: Exception, now: float) -> None:
        """A replica answered with an error: another one may do better, or time, or nothing."""
        task = attempt.task
        assert attempt.replica is not None
        if not task.open:
            return
        task.reason = str(error)
        task.tried.add(attempt.replica)
        reaches = self._reaches(attempt.shard)
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
        self._forget(number)
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

    def _end(self, number: int, now: float) -> None:
        """Nobody waits for this attempt any longer."""
        attempt = self._attempts[number]
        self._forget(number)
        if attempt.replica is not None:
            self._links.book.abandoned(attempt.shard, attempt.replica, now - attempt.sent_at, now)

    def _forget(self, number: int) -> None:
        attempt = self._attempts.pop(number)
        del attempt.task.attempts[number]

    def _reaches(self, shard: int) -> dict[int, Reach]:
        endpoints = self._links.endpoints
        return {r: endpoints.reach(shard, r) for r in range(self._links.replicas[shard])}

    def _preamble(
        self, kind: Kind, shard: int, number: int, epoch: int | None, left_s: float, wait_s: float
    ) -> bytes:
        return Preamble(
            kind=kind,
            shard=self._links.shards[shard],
            number=number,
            epoch=epoch,
            timeout_s=left_s,
            wait_s=wait_s,
            proof=self._links.proof,
        ).pack()


def _too_many_by_actor(shard: int) -> Overloaded:
    return Overloaded(
        f"shard {shard} is overloaded: it is asked by way of its actor, and as many calls of this "
        "process as may be are on their way; ask again later, or see to it that this process "
        "reaches the sockets of the shards (`host`)"
    )
