"""Where each replica's search server is now. Finding out may block, so a thread beside does it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from memory_server.errors import ShardLost

log = logging.getLogger(__name__)

ResolveEndpoint = Callable[[int, int], str | None]
"""(shard, replica) to "tcp://host:port", or None: it answers, but only by way of its actor.

Raises ShardLost: gone for good. Anything else: ask again in a moment."""

ASK_AGAIN_S = 0.05
REFUSED_AT_MOST = 3  # connections to one whose actor answers, before searches go by the actor
GONE_FOR_S = 1.0  # one that is gone for good is asked about again: it may have been started anew
BY_ACTOR_S = 30.0  # then for so long, until a socket is tried again


@dataclass(frozen=True)
class Reach:
    """How to reach a replica: by `socket` at an address, by `actor`, not yet (`unknown`), never."""

    kind: Literal["socket", "actor", "unknown", "gone"]
    address: str = ""
    reason: str = ""
    lost_at: float | None = None


@dataclass
class _Known:
    reach: Reach
    resolving: bool = False
    try_at: float = 0.0
    refused: int = 0
    by_actor_until: float = 0.0


class Endpoints:
    """What is known of every replica's place. Thread-safe; never blocks whoever searches."""

    def __init__(
        self, replicas: Sequence[int], resolve: ResolveEndpoint, *, can_call_actors: bool
    ) -> None:
        self._resolve = resolve
        self._can_call_actors = can_call_actors
        self._lock = threading.Lock()
        self._known = {
            (shard, replica): _Known(Reach("unknown", reason="it was not found yet"))
            for shard, count in enumerate(replicas)
            for replica in range(count)
        }
        self._told: set[tuple[int, int]] = set()
        self._closed = False

    def reach(self, shard: int, replica: int) -> Reach:
        """What is known now. Begins to find out, in the background, what is not."""
        with self._lock:
            known = self._known[shard, replica]
            now = time.monotonic()
            if known.reach.kind == "gone" and now >= known.try_at:
                known.reach = Reach("unknown", reason=known.reach.reason, lost_at=now)
            again = known.reach.kind == "actor" and now >= known.by_actor_until
            look = known.reach.kind == "unknown" or again
            if look and not known.resolving and now >= known.try_at and not self._closed:
                known.resolving = True
                threading.Thread(
                    target=self._find,
                    args=(shard, replica),
                    name=f"find-shard-{shard}-{replica}",
                    daemon=True,  # a question to an actor that hangs must not keep the process
                ).start()
            return known.reach

    def addresses(self) -> set[str]:
        """All that are known."""
        with self._lock:
            return {k.reach.address for k in self._known.values() if k.reach.kind == "socket"}

    def answered(self, shard: int, replica: int) -> None:
        """It is there: earlier losses no longer count."""
        known = self._known[shard, replica]
        if known.refused or known.reach.lost_at is not None:
            with self._lock:
                known.refused = 0
                known.reach = Reach(known.reach.kind, known.reach.address, known.reach.reason)

    def lost(self, shard: int, replica: int, address: str, reason: str, *, refused: bool) -> None:
        """The connection to this address broke, or was refused: look where the replica is now."""
        with self._lock:
            known = self._known[shard, replica]
            if known.reach.kind != "socket" or known.reach.address != address:
                return  # another thread noticed first
            known.refused = known.refused + 1 if refused else 0
            lost_at = known.reach.lost_at
            now = time.monotonic()
            known.reach = Reach(
                "unknown", reason=reason, lost_at=now if lost_at is None else lost_at
            )
            known.try_at = now + (ASK_AGAIN_S if refused else 0.0)

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def _find(self, shard: int, replica: int) -> None:
        """Runs on a thread of its own."""
        address: str | None = None
        failure: Exception | None = None
        try:
            address = self._resolve(shard, replica)
        except Exception as error:  # whatever it is, it is the reason that a search will be told
            failure = error
        with self._lock:
            known = self._known[shard, replica]
            known.resolving = False
            now = time.monotonic()
            lost_at = known.reach.lost_at
            if isinstance(failure, ShardLost):
                known.reach = Reach("gone", reason=str(failure), lost_at=lost_at)
                known.try_at = now + GONE_FOR_S
            elif failure is not None:
                reason = f"it cannot be found ({type(failure).__name__}: {failure})"
                known.reach = Reach(
                    "unknown", reason=reason, lost_at=now if lost_at is None else lost_at
                )
                known.try_at = now + ASK_AGAIN_S
            elif address is None or known.refused >= REFUSED_AT_MOST:
                self._go_by_actor(known, (shard, replica), address, now)
            else:
                known.reach = Reach("socket", address, lost_at=lost_at)

    def _go_by_actor(
        self, known: _Known, which: tuple[int, int], address: str | None, now: float
    ) -> None:
        shard, replica = which
        where = "no socket" if address is None else f"a socket at {address} that refuses"
        if not self._can_call_actors:
            known.reach = Reach(
                "unknown", reason=f"it has {where}", lost_at=known.reach.lost_at or now
            )
            known.try_at = now + ASK_AGAIN_S
            known.refused = 0
            return
        known.reach = Reach("actor")
        known.refused = 0
        known.by_actor_until = now + BY_ACTOR_S
        if which not in self._told:
            self._told.add(which)
            log.warning(
                "replica %d of shard %d has %s: it is asked by way of its actor, which is slower",
                replica,
                shard,
                where,
            )
