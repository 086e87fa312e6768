"""Whom one call asks: the likeliest replica, a second one that hedges it, or a relay for a group.

By its socket, or, where that cannot be reached, by way of its actor. `fan_out_call` decides when.
"""

import itertools
import random

from memory_server.api import LostShardPolicy
from memory_server.errors import Overloaded
from memory_server.wire.endpoints import Reach
from memory_server.wire.fan_out_tasks import Attempt, Links, Question, Task
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.messages import pack_group
from memory_server.wire.search_client import Lane

LOOK_AGAIN_S = 0.002  # while an actor is asked, or a replica's place is being found out
GRACE_S = 0.2  # "degrade" gives a shard that was just lost so long to be found again
RELAY_SHARE = 0.5  # of the time that is left; then its group is asked directly
# A relay that is so much slower than 95 of 100 were is given up sooner. Its shards, asked
# directly, can be hedged where they have replicas; where they have none, a slow one would only have
# more to do, so that the relay must be slower than a busy shard is.
RELAY_PATIENCE = 3.0
ALONE_AT_LEAST_S = 1.0

_numbers = itertools.count(1)

Refusal = tuple[Attempt, Overloaded]


class Asker:
    """Sends what one call asks, and keeps what is on its way. Not for two threads.

    Attributes:
        attempts: by the number that their reply will bear.
    """

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
        self.attempts: dict[int, Attempt] = {}

    def start(self, task: Task, now: float) -> Refusal | None:
        """Ask the replica that is likely to answer first, if one can be reached.

        Returns:
            An attempt that could not be begun, and why.
        """
        shard = task.shards[0]
        reaches = self.reaches(shard)
        usable = [r for r, reach in reaches.items() if reach.kind in ("socket", "actor")]
        if not usable:
            self._nobody_to_ask(task, reaches, now)
            return None
        untried = [r for r in usable if r not in task.tried]
        if not untried:
            task.tried.clear()
        replica = self._links.book.choose(shard, untried or usable, now)
        refusal = self._send(task, replica, reaches[replica], now)
        others = [r for r in usable if r != replica]
        if others:
            probe = self._links.book.probe(shard, others, now)
            if probe is not None:
                self._send(task, probe, reaches[probe], now)
            task.hedge_at = now + self._links.delay.seconds
        return refusal

    def hedge(self, task: Task, now: float) -> None:
        """Ask a second replica the same, if one has less to do than the first, which is slow."""
        task.hedge_at = float("inf")
        asked = {a.replica for a in task.attempts.values()}
        if task.relay or len(asked) != 1:
            return
        (first,) = asked
        assert first is not None
        shard = task.shards[0]
        reaches = self.reaches(shard)
        usable = [r for r, reach in reaches.items() if reach.kind == "socket"]
        other = self._links.book.less_busy(shard, first, usable, now)
        if other is not None:
            self._links.counters.add(hedged=1)
            self._send(task, other, reaches[other], now, hedge=True)

    def start_relay(self, task: Task, now: float) -> bool:
        """Ask one server to ask the group; which one is drawn, so that all take their turn.

        Returns:
            Whether all of the group have sockets, which a relay needs.
        """
        members = []
        for shard in task.shards:
            reaches = self.reaches(shard)
            sockets = [r for r, reach in reaches.items() if reach.kind == "socket"]
            if not sockets:
                return False
            replica = self._links.book.choose(shard, sockets, now)
            members.append((self._links.shards[shard], reaches[replica].address))
        at = random.randrange(len(members))
        shard, address, number = task.shards[at], members[at][1], next(_numbers)
        left_s = RELAY_SHARE * (self._deadline - now)
        attempt = Attempt(task, shard, None, address, now)
        self.attempts[number] = task.attempts[number] = attempt
        hedged = all(self._links.replicas[shard] > 1 for shard in task.shards)
        patience_s = max(
            RELAY_PATIENCE * self._links.relay_delay.seconds, 0.0 if hedged else ALONE_AT_LEAST_S
        )
        task.relay_until = now + min(left_s, patience_s)
        self._links.counters.add(asked=1)
        wait_s = left_s if self._policy == "wait" else 0.0
        preamble = self._preamble(Kind.RELAY, shard, number, task.epoch, left_s, wait_s)
        self._lane.send(address, [preamble, self._question.body, pack_group(members)])
        return True

    def end(self, number: int, now: float) -> None:
        """Nobody waits for this attempt any longer."""
        attempt = self.attempts[number]
        self.forget(number)
        if attempt.replica is not None:
            self._links.book.abandoned(attempt.shard, attempt.replica, now - attempt.sent_at, now)

    def forget(self, number: int) -> None:
        """It was answered, or cannot be."""
        attempt = self.attempts.pop(number)
        del attempt.task.attempts[number]

    def reaches(self, shard: int) -> dict[int, Reach]:
        """How each replica of a shard can be reached now."""
        endpoints = self._links.endpoints
        return {r: endpoints.reach(shard, r) for r in range(self._links.replicas[shard])}

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

    def _send(
        self, task: Task, replica: int, reach: Reach, now: float, *, hedge: bool = False
    ) -> Refusal | None:
        shard, number = task.shards[0], next(_numbers)
        left_s = max(0.0, self._deadline - now)
        wait_s = left_s if self._policy == "wait" else 0.0
        attempt = Attempt(task, shard, replica, reach.address, now, hedge)
        self.attempts[number] = task.attempts[number] = attempt
        self._links.book.sent(shard, replica)
        self._links.counters.add(asked=1)
        if reach.kind == "actor":
            return self._call_actor(number, attempt, wait_s, left_s, now)
        preamble = self._preamble(self._question.kind, shard, number, task.epoch, left_s, wait_s)
        self._lane.send(reach.address, [preamble, self._question.body])
        return None

    def _call_actor(
        self, number: int, attempt: Attempt, wait_s: float, left_s: float, now: float
    ) -> Refusal | None:
        links, replica = self._links, attempt.replica
        assert links.actor_call is not None
        assert replica is not None
        if not links.actor_slots.acquire(blocking=False):
            self.end(number, now)
            return attempt, _too_many_by_actor(attempt.shard)
        links.counters.add(actor_calls=1)
        arguments = self._question.arguments(attempt.task.epoch, wait_s)
        attempt.future = links.actors.submit(
            links.actor_call, attempt.shard, replica, self._question.method, arguments, left_s
        )
        attempt.future.add_done_callback(lambda _: links.actor_slots.release())
        return None

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
