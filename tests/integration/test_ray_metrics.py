"""A memory's numbers arrive where Prometheus scrapes Ray; needs the extra `metrics`."""

import time
import urllib.request
from pathlib import Path

import pytest
import ray

from memory_server.actors.client import RayMemory
from tests.ray_fixture import local_ray
from tests.toy_memory import toy_entries, toy_factory, toy_queries, toy_store, toy_weights

pytestmark = pytest.mark.integration

WANTED = ("requests", "queries", "latency_s_bucket", "epoch", "staleness_steps", "queue", "bytes")


def scraped() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as page:
        text: str = page.read().decode()
        return text


def test_metrics_are_scraped(tmp_path: Path) -> None:
    pytest.importorskip("opencensus", reason="Ray exports no metrics without ray[default]")
    store = toy_store(tmp_path / "s", toy_entries(range(50)))
    with (
        local_ray(),
        RayMemory.start(
            store.path,
            shards=2,
            encoder=toy_factory,
            weights=toy_weights(1),
            name="measured",
            cpus_per_shard=0.5,
        ) as memory,
    ):
        deadline, missing = time.monotonic() + 90, set(WANTED)
        while missing and time.monotonic() < deadline:
            memory.search(toy_queries(3), 2)
            time.sleep(1.0)
            page = scraped()
            missing = {name for name in WANTED if f"pluglm_memory_{name}" not in page}
        assert not missing
        assert 'memory="measured"' in page
