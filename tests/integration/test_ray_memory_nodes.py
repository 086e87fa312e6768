"""RayMemory over several nodes: replicas are apart, and the loss of a node is not felt."""

import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from memory_server.actors.client import RayMemory
from tests.integration.support_ray_memory import Stream, refreshed
from tests.toy_memory import toy_entries, toy_factory, toy_store, toy_weights

pytestmark = pytest.mark.integration

ENTRIES = toy_entries(range(60))
# A lost node is noticed in two seconds instead of fourteen.
QUICK = {
    "worker_niceness": 0,
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}


def nodes_of(memory: RayMemory) -> set[str]:
    """The nodes whose actors answer."""
    return {s.node for s in memory.stats().per_shard if s.state != "silent"}


def test_a_node_is_removed_while_searches_go_on(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "store", ENTRIES)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "_system_config": QUICK,
        },
    )
    try:
        worker = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        cluster.wait_for_nodes()
        with RayMemory.start(
            store.path,
            shards=2,
            replicas=2,
            encoder=toy_factory,
            weights=toy_weights(1),
            name="nodes",
            cpus_per_shard=0.2,
            deadline_s=40.0,
        ) as memory:
            nodes = {(s.shard, s.replica): s.node for s in memory.stats().per_shard}
            assert len(set(nodes.values())) == 2
            assert nodes[0, 0] != nodes[0, 1]
            assert nodes[1, 0] != nodes[1, 1]
            first = memory.info().epoch
            with Stream(memory, ENTRIES) as stream:
                cluster.remove_node(worker, allow_graceful=False)
                stream.wait_for(10)
                second = refreshed(memory, encoder_step=5, weights=toy_weights(2))
                stream.wait_for(5)
            assert stream.check({first: toy_weights(1), second: toy_weights(2)}) >= {second}
            # Actors of a node that is gone may answer for a moment more.
            deadline = time.monotonic() + 60
            while len(left := nodes_of(memory)) > 1 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert len(left) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
