"""Which replica to ask, and when to ask a second one. Times are given, so tests need no clock."""

import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

HedgeAfter = float | Literal["p95"]

FORGET_AFTER_S = 5.0  # half-life of a latency, so that a replica that was slow is tried again
PROBE_EVERY_S = 1.0  # how often a replica that was lost gets a copy of a search
SAMPLES = 256
SAMPLES_AT_LEAST = 32
RECOUNT_EVERY = 32
HEDGE_AT_LEAST_S = 0.002  # below this the copy costs more than it saves


@dataclass
class _Replica:
    outstanding: int = 0
    latency_s: float = 0.0
    measured_at: float = 0.0
    lost: bool = False
    probe_at: float = 0.0


class ReplicaBook:
    """How each replica of each shard has been answering this process. Thread-safe."""

    def __init__(
        self, replicas: Sequence[int], *, lot: Callable[[], float] = random.random
    ) -> None:
        """`lot` draws between equals; a simulation gives one that it can repeat."""
        self._lock = threading.Lock()
        self._lot = lot
        self._replicas = [[_Replica() for _ in range(count)] for count in replicas]

    def choose(self, shard: int, usable: Collection[int], now: float) -> int:
        """The usable replica that is likely to answer first; lost ones only if all are.

        That is the one with the least (outstanding + 1) x recent latency; one that was not measured
        lately counts as fast, and equals are drawn by lot.
        """
        if len(usable) == 1:
            return next(iter(usable))
        with self._lock:
            replicas = self._replicas[shard]

            def cost(number: int) -> tuple[bool, float, int, float]:
                replica = replicas[number]
                age_s = max(0.0, now - replica.measured_at)
                recent_s = replica.latency_s * 0.5 ** (age_s / FORGET_AFTER_S)
                return (
                    replica.lost,
                    (replica.outstanding + 1) * recent_s,
                    replica.outstanding,
                    self._lot(),
                )

            return min(usable, key=cost)

    def probe(self, shard: int, usable: Collection[int], now: float) -> int | None:
        """A lost replica that may get a copy of a search now, to see whether it answers again."""
        with self._lock:
            for number in usable:
                replica = self._replicas[shard][number]
                if replica.lost and now >= replica.probe_at:
                    replica.probe_at = now + PROBE_EVERY_S
                    return number
        return None

    def less_busy(self, shard: int, than: int, usable: Collection[int], now: float) -> int | None:
        """Whom to ask as well: a copy must not go to a replica that has more to do, or is lost."""
        with self._lock:
            replicas = self._replicas[shard]
            allowed = [
                number
                for number in usable
                if number != than
                and not replicas[number].lost
                and replicas[number].outstanding <= replicas[than].outstanding
            ]
        return self.choose(shard, allowed, now) if allowed else None

    def sent(self, shard: int, replica: int) -> None:
        with self._lock:
            self._replicas[shard][replica].outstanding += 1

    def answered(self, shard: int, replica: int, seconds: float, now: float) -> None:
        """It answered, be it with an error: it is not lost."""
        with self._lock:
            state = self._replicas[shard][replica]
            state.outstanding -= 1
            state.lost = False
            state.latency_s = (state.latency_s + seconds) / 2 if state.measured_at else seconds
            state.measured_at = now

    def abandoned(self, shard: int, replica: int, seconds: float, now: float) -> None:
        """Nobody waits for it any more after so many seconds: it is at least that slow."""
        with self._lock:
            state = self._replicas[shard][replica]
            state.outstanding -= 1
            if seconds > state.latency_s:
                state.latency_s, state.measured_at = seconds, now

    def lost(self, shard: int, replica: int, now: float) -> None:
        """Its connection broke, or it could not be reached."""
        with self._lock:
            state = self._replicas[shard][replica]
            state.outstanding -= 1
            if not state.lost:
                state.lost, state.probe_at = True, now + PROBE_EVERY_S


class HedgeDelay:
    """How long to wait for the first replica: fixed, or what 95 of 100 recent answers took."""

    def __init__(self, after: HedgeAfter) -> None:
        """Raises ValueError: neither "p95" nor a number of seconds above 0."""
        if after != "p95" and not (isinstance(after, int | float) and after > 0):
            raise ValueError(f"hedge_after={after!r}; allowed: 'p95', or seconds above 0")
        self._after = after
        self._lock = threading.Lock()
        self._recent_s: deque[float] = deque(maxlen=SAMPLES)
        self._count = 0
        self._p95_s = float("inf")

    @property
    def seconds(self) -> float:
        """Infinity while too few answers were seen."""
        return self._p95_s if self._after == "p95" else float(self._after)

    def record(self, seconds: float) -> None:
        if self._after != "p95":
            return
        with self._lock:
            self._recent_s.append(seconds)
            self._count += 1
            if self._count >= SAMPLES_AT_LEAST and self._count % RECOUNT_EVERY == 0:
                ordered = sorted(self._recent_s)
                at = int(0.95 * (len(ordered) - 1))
                self._p95_s = max(HEDGE_AT_LEAST_S, ordered[at])
