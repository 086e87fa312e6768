"""What a memory says about itself: plain numbers and words, for `pluglm memory stats` and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from memory_server.api import StageState
from memory_server.wire.search_stats import LATENCY_BUCKETS_S


@dataclass(frozen=True, kw_only=True)
class Latency:
    """From a request's arrival to its reply, milliseconds.

    The percentiles are upper limits of a histogram's buckets, as in Prometheus; None: beyond the
    last one, or nothing was answered yet.
    """

    count: int = 0
    mean_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


def latency(counts: Sequence[int], sum_s: float) -> Latency:
    """From a histogram over `LATENCY_BUCKETS_S`; the last count is of those beyond."""
    total = sum(counts)
    if not total:
        return Latency()
    p50, p95, p99 = (_quantile_ms(counts, share) for share in (0.5, 0.95, 0.99))
    return Latency(count=total, mean_ms=1000 * sum_s / total, p50_ms=p50, p95_ms=p95, p99_ms=p99)


def _quantile_ms(counts: Sequence[int], share: float) -> float | None:
    wanted, seen = share * sum(counts), 0
    for count, limit_s in zip(counts, LATENCY_BUCKETS_S, strict=False):
        seen += count
        if seen >= wanted:
            return 1000 * limit_s
    return None


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """One replica of one shard, since it started.

    Attributes:
        state: "serving"; "restoring" after a restart; "silent": dead, restarting, or too busy.
        requests, queries: searches that were accepted, and their rows.
        newest_step: of the weights of all epochs that it holds or stages.
        queue: searches that wait now.
        bytes: of the live epoch, by part.
        recall: the newest recall audit; empty if there was none.
        restarts: how often it came up again, as far as the coordinator knows.
    """

    shard: int
    replica: int
    state: str
    error: str | None = None
    node: str = ""
    pid: int = 0
    device: str = ""
    epoch: int | None = None
    encoder_step: int | None = None
    newest_step: int | None = None
    requests: int = 0
    queries: int = 0
    overloaded: int = 0
    failed: int = 0
    queue: int = 0
    queue_peak: int = 0
    queue_limit: int = 0
    latency: Latency = field(default_factory=Latency)
    latency_counts: tuple[int, ...] = ()
    bytes: Mapping[str, int] = field(default_factory=dict)
    recall: Mapping[str, float | int | bool | str | None] = field(default_factory=dict)
    restarts: int = 0
    uptime_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """An epoch that is held or coming. `remaining_s`: None where nothing can be said."""

    epoch: int
    state: StageState
    live: bool
    content_version: str
    encoder_step: int
    done: int
    total: int
    remaining_s: float | None
    pins: int
    leaving: bool
    error: str | None


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """The whole memory.

    Attributes:
        newest_step: the newest encoder step of the epochs that are held or coming.
        staleness_steps: by how much the live keys are behind it.
        live_s: seconds since the live epoch was activated; None: before the coordinator restarted.
        pins: of readers. epochs: all that are held or coming.
        queries, overloaded, bytes: of all replicas together.
        client: what the fan-out of the process that asks has counted.
    """

    name: str
    store: str
    epoch: int | None
    encoder_step: int | None
    content_version: str | None
    entries: int
    key_width: int | None
    index: str
    shards: int
    replicas: int
    newest_step: int
    staleness_steps: int
    live_s: float | None
    pins: int
    epochs: tuple[EpochStats, ...]
    queries: int
    overloaded: int
    bytes: Mapping[str, int]
    per_shard: tuple[ShardStats, ...]
    client: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As `json.dumps` takes it."""
        return asdict(self)


def total_bytes(shards: Sequence[ShardStats]) -> dict[str, int]:
    """By part, of all replicas."""
    total: dict[str, int] = {}
    for shard in shards:
        for part, count in shard.bytes.items():
            total[part] = total.get(part, 0) + count
    return total
