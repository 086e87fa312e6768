"""What a search server and a fan-out count, for `pluglm memory stats` and for Prometheus."""

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerStats:
    """Since the server began. `latency_counts[i]` of the answered requests took at most
    `LATENCY_BUCKETS_S[i]` from arrival to reply and longer than the bucket before; the last count
    is of those beyond.

    Attributes:
        requests, queries: searches that arrived, and their rows; those turned away count, too.
        searches: calls of `Shard.search`; joined: those that answered several requests.
        refused: wrong secret, wrong shard, or no message of the protocol.
        overloaded: turned away because the queue was full.
        expired: dropped because their deadline passed while they waited.
        failed: answered with an error of the shard.
        relayed: searches that this server asked of a group of shards for a client.
    """

    shard: int
    requests: int
    queries: int
    searches: int
    joined: int
    entries: int
    relayed: int
    refused: int
    overloaded: int
    expired: int
    failed: int
    queue: int
    queue_peak: int
    queue_limit: int
    bytes_in: int
    bytes_out: int
    latency_counts: tuple[int, ...]
    latency_sum_s: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "latency_buckets_s": LATENCY_BUCKETS_S}


@dataclass(frozen=True, kw_only=True)
class FanoutStats:
    """Since the fan-out began; all processes have their own.

    Attributes:
        searches: calls. asked: requests that were sent, to shards and relays.
        repeated: sent again after a lost connection, a full queue or a restarted shard.
        epoch_switches: searches whose shards first answered from two epochs, and were asked again.
        hedged: sent to a second replica because the first was slow; hedges_won: answered first.
        relayed: groups that a relay answered for; relays_failed: groups asked directly instead.
        actor_calls: requests that went by Ray, because no socket could be reached.
        degraded: searches that were answered without some shard.
    """

    searches: int = 0
    asked: int = 0
    repeated: int = 0
    epoch_switches: int = 0
    hedged: int = 0
    hedges_won: int = 0
    relayed: int = 0
    relays_failed: int = 0
    actor_calls: int = 0
    overloaded: int = 0
    connections_lost: int = 0
    degraded: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Counters:
    """Named numbers that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = {}

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] = self._values.get(name, 0) + amount

    def values(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._values)


def fanout_stats(counters: Counters) -> FanoutStats:
    values = counters.values()
    return FanoutStats(**{f.name: values.get(f.name, 0) for f in fields(FanoutStats)})


class Latencies:
    """A histogram with fixed buckets, so that those of many servers can be added up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def record(self, seconds: float) -> None:
        bucket = next(
            (i for i, limit in enumerate(LATENCY_BUCKETS_S) if seconds <= limit),
            len(LATENCY_BUCKETS_S),
        )
        with self._lock:
            self._counts[bucket] += 1
            self._sum_s += seconds

    def values(self) -> tuple[tuple[int, ...], float]:
        """(counts by bucket, the sum of all in seconds)"""
        with self._lock:
            return tuple(self._counts), self._sum_s
