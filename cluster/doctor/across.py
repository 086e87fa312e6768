"""An all-reduce between the nodes of a Ray cluster, over the network that trainers will use."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.doctor.findings import Finding
from cluster.doctor.reduce import reduce_once

_FIX = (
    "let the nodes connect to each other on any port (firewall, security group), and name the "
    "right network if there are several (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
)


def all_reduce_across(nodes: Sequence[dict[str, Any]], *, timeout_s: float) -> Iterator[Finding]:
    """Have one process on every node add a vector up; with GPUs on several nodes over NCCL, too.

    Args:
        nodes: those that are alive, as `ray.nodes()` tells them.
        timeout_s: how long they may take to meet and to add up.
    """
    if len(nodes) > 1:
        yield _all_reduce("gloo", nodes, timeout_s)
    with_gpus = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if len(with_gpus) > 1:
        yield _all_reduce("nccl", with_gpus, timeout_s)


def _all_reduce(backend: str, nodes: Sequence[dict[str, Any]], timeout_s: float) -> Finding:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on(node: dict[str, Any], call: Any, **options: Any) -> Any:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # A process that hangs in a connection is ended with its task, and no other call gets it.
        task: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(call)
        return task.options(scheduling_strategy=where, **options)

    gpus = {"num_gpus": 1} if backend == "nccl" else {}
    asked = []
    try:
        host, port = ray.get(on(nodes[0], _address).remote(), timeout=timeout_s)
        init_method = f"tcp://{host}:{port}"
        asked = [
            on(node, reduce_once, **gpus).remote(rank, len(nodes), init_method, backend, timeout_s)
            for rank, node in enumerate(nodes)
        ]
        took = max(ray.get(asked, timeout=timeout_s))
    except GetTimeoutError:
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=0) if asked else ([], [])
        silent = [
            n["NodeManagerAddress"] for n, a in zip(nodes, asked, strict=False) if a not in ready
        ]
        for reference in asked:
            ray.cancel(reference, force=True)
        who = ", ".join(silent) or nodes[0]["NodeManagerAddress"]
        reason = f"{who} did not end within {timeout_s:g} s"
    except RayError as error:
        for reference in asked:
            ray.cancel(reference, force=True)
        cause = getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    else:
        return Finding(
            grade="ok", what=f"{backend} between {len(nodes)} nodes adds up in {1000 * took:.0f} ms"
        )
    what = f"{backend} between {len(nodes)} nodes failed: {reason}"
    return Finding(grade="problem", what=what, fix=_FIX)


def _address() -> tuple[str, int]:
    """Where the processes can meet on this node."""
    import ray

    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])
