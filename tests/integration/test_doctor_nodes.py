"""The doctor has the nodes of a cluster add up over their network, and says who does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.doctor import across
from cluster.doctor.across import all_reduce_across
from tests.integration.test_ray_memory_nodes import QUICK

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[dict[str, Any]]]:
    """Two nodes without CPUs to spare."""
    head = {
        "num_cpus": 0,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "_system_config": QUICK,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=0, object_store_memory=80 * 2**20)
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        made.wait_for_nodes()
        yield [node for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
        made.shutdown()


def test_nodes_that_reach_each_other_add_up(nodes: list[dict[str, Any]]) -> None:
    (found,) = all_reduce_across(nodes, timeout_s=90.0)
    assert found.grade == "ok", found.what
    assert found.what.startswith("gloo between 2 nodes adds up in")
    assert list(all_reduce_across(nodes[:1], timeout_s=1.0)) == []


def test_nodes_that_do_not_are_told_in_time(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An address that is no host's: packets to it are lost, as behind a firewall.
    monkeypatch.setattr(across, "_address", _nowhere)
    (found,) = all_reduce_across(nodes, timeout_s=12.0)
    assert found.grade == "problem"
    assert found.what.startswith("gloo between 2 nodes failed: ")
    assert "GLOO_SOCKET_IFNAME" in found.fix


def _nowhere() -> tuple[str, int]:
    return "203.0.113.7", 9
