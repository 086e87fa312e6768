"""A shard's numbers as Ray's Prometheus metrics, renewed every second."""

import logging
import threading
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

from memory_server.stats import ShardStats
from memory_server.wire.search_stats import LATENCY_BUCKETS_S

log = logging.getLogger(__name__)

EVERY_S = 1.0
OBSERVATIONS_AT_MOST = 256  # of latency, in one round: of more requests, a sample in proportion
TAGS = ("memory", "shard", "replica")


def latency_sample(counts: list[int], at_most: int) -> list[float]:
    """Seconds that stand for new requests: each bucket's upper limit, as often as it was met.

    Args:
        counts: new requests by bucket; the last is of those beyond all limits.
    """
    total = sum(counts)
    share = min(1.0, at_most / total) if total else 0.0
    limits = (*LATENCY_BUCKETS_S, 2 * LATENCY_BUCKETS_S[-1])
    sample = []
    for count, limit_s in zip(counts, limits, strict=True):
        # Rare ones are what a histogram is looked at for: none of them is left out.
        sample += [limit_s] * (max(1, round(count * share)) if count else 0)
    return sample


class MetricsPublisher:
    """Publishes until it is closed. Whatever goes wrong with metrics, searches go on."""

    def __init__(
        self, report: Callable[[], ShardStats], *, memory: str, shard: int, replica: int
    ) -> None:
        self._report = report
        self._tags = {"memory": memory, "shard": str(shard), "replica": str(replica)}
        self._closed = threading.Event()
        self._counted = {"requests": 0, "queries": 0, "overloaded": 0, "failed": 0}
        self._latencies: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        self._counters = {
            name: Counter(f"pluglm_memory_{name}", f"Searches: {name}.", tag_keys=TAGS)
            for name in self._counted
        }
        self._gauges = {
            name: Gauge(f"pluglm_memory_{name}", text, tag_keys=TAGS)
            for name, text in (
                ("queue", "Searches that wait."),
                ("epoch", "The live epoch."),
                ("encoder_step", "Optimizer step whose weights made the live keys."),
                ("staleness_steps", "Newest published weights' step less that of the live keys."),
                ("recall", "Recall of the newest audit."),
                ("stale_share", "Share of the top-k before the last refresh that it kept."),
            )
        }
        self._bytes = Gauge(
            "pluglm_memory_bytes", "Bytes of the live epoch.", tag_keys=(*TAGS, "part")
        )
        self._latency = Histogram(
            "pluglm_memory_latency_s",
            "From a request's arrival to its reply.",
            boundaries=list(LATENCY_BUCKETS_S),
            tag_keys=TAGS,
        )
        while not self._closed.wait(EVERY_S):
            try:
                self._publish(self._report())
            except Exception as error:
                log.warning("metrics of shard %s: %s", self._tags["shard"], error)

    def _publish(self, stats: ShardStats) -> None:
        for name, before in self._counted.items():
            now = int(getattr(stats, name))
            if now > before:
                self._counters[name].inc(now - before, tags=self._tags)
            self._counted[name] = now
        self._gauges["queue"].set(stats.queue, tags=self._tags)
        if stats.epoch is not None:
            self._gauges["epoch"].set(stats.epoch, tags=self._tags)
        if stats.encoder_step is not None:
            self._gauges["encoder_step"].set(stats.encoder_step, tags=self._tags)
            staleness = max(0, (stats.newest_step or 0) - stats.encoder_step)
            self._gauges["staleness_steps"].set(staleness, tags=self._tags)
        for name in ("recall", "stale_share"):
            measured = stats.recall.get(name)
            if isinstance(measured, float):
                self._gauges[name].set(measured, tags=self._tags)
        for part, count in stats.bytes.items():
            self._bytes.set(count, tags={**self._tags, "part": part})
        before_counts = self._latencies or (0,) * len(stats.latency_counts)
        new = [now - then for now, then in zip(stats.latency_counts, before_counts, strict=True)]
        self._latencies = stats.latency_counts
        for seconds in latency_sample(new, OBSERVATIONS_AT_MOST):
            self._latency.observe(seconds, tags=self._tags)
