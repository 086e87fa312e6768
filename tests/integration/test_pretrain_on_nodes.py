"""A run on several Ray nodes of one machine: a node is lost, another joins, the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.integration.support_pretrain import make_corpus, pretraining, read_lines, write_config
from tests.integration.test_ray_memory_nodes import QUICK

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 150
STORE_BYTES = 80 * 2**20
NODE = {"num_cpus": 2, "object_store_memory": STORE_BYTES}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes: one for the shards and one for the trainers."""
    head = {
        "num_cpus": 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_system_config": QUICK,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(**NODE, resources={"memory_node": 1})
        made.add_node(**NODE, resources={"trainer_node": 1})
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def node_of_trainers(cluster: Any) -> Any:
    """The node whose raylet started the trainers' processes."""
    parents = {
        process.ppid()
        for process in psutil.process_iter(["cmdline"])
        if "".join(process.info["cmdline"] or []).startswith("ray::TrainerHost")
    }
    (node,) = [
        node
        for node in cluster.worker_nodes
        if node.all_processes["raylet"][0].process.pid in parents
    ]
    return node


def test_a_lost_node_is_waited_for_and_training_goes_on(cluster: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, make_corpus(tmp_path))
    words = [
        f"cluster.address={cluster.address}",
        "memory.node_resource=memory_node",
        "runtime.node_resource=trainer_node",
        f"optim.steps={STEPS}",
        "checkpoint.every_steps=10",
    ]
    with pretraining(config, *words) as run:
        run.wait_for_checkpoint_after(0)
        cluster.remove_node(node_of_trainers(cluster), allow_graceful=False)
        run.wait_until(lambda: "starting again from step-" in run.said(), what="the loss, told")
        cluster.add_node(**NODE, resources={"trainer_node": 1})
        ended = run.end()
    assert ended.code == 0, ended.stderr
    (restart,) = read_lines(run.run_dir, "restart")
    assert "died (killed, out of memory, or its node was lost)" in restart["reason"]
    assert restart["step"] >= 10
    steps = [line["step"] for line in read_lines(run.run_dir, "train")]
    assert steps == list(range(1, STEPS + 1))
