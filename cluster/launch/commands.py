"""Command lines for what is up already: a Ray cluster that takes jobs, nodes with torchrun."""

from __future__ import annotations

import json
import shlex

from cluster.config_text import is_host_and_port
from cluster.errors import LaunchError
from cluster.launch.plan import LaunchPlan


def ray_job_command(plan: LaunchPlan, *, address: str) -> str:
    """`ray job submit` of the run to a cluster's dashboard.

    Args:
        address: such as "http://head:8265".

    Raises:
        LaunchError: no http address.
    """
    if not address.startswith(("http://", "https://")):
        raise LaunchError(f"address {address!r}: give the dashboard's, such as http://head:8265")
    words = ["ray", "job", "submit", "--address", address, "--no-wait"]
    # The driver only watches: it needs no CPU of the cluster. `ray job stop` would leave it 3 s.
    stop_s = int(plan.config.recovery.grace_s) + 30
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)}}
    words += ["--entrypoint-num-cpus", "0", "--runtime-env-json", json.dumps(environment), "--"]
    inside = shlex.join(plan.command("cluster.address=auto"))
    return shlex.join([*words, "bash", "-c", f"cd {shlex.quote(str(plan.directory))} && {inside}"])


def torchrun_command(plan: LaunchPlan, *, address: str, rendezvous: str = "") -> str:
    """`torchrun` of the trainers beside a memory server.

    Args:
        address: of the Ray in which the server runs, "host:port" or "auto".
        rendezvous: "host:port" where the nodes meet; needed with several.

    Raises:
        LaunchError: no server is named; nodes cannot meet; trainers do not divide over nodes.
    """
    runtime = plan.config.runtime
    if not plan.config.memory.server:
        raise LaunchError(
            "torchrun starts trainers only: name a server that runs (`pluglm memory serve`) with "
            "memory.server=NAME"
        )
    if address != "auto" and not is_host_and_port(address):
        raise LaunchError(f'address {address!r}: give "auto" or host:port, such as head:6379')
    if runtime.trainers % plan.nodes:
        raise LaunchError(
            f"runtime.trainers = {runtime.trainers}: must be a multiple of the {plan.nodes} nodes"
        )
    words = ["torchrun", "--nproc-per-node", str(runtime.trainers // plan.nodes)]
    if plan.nodes > 1:
        if not rendezvous:
            raise LaunchError("several nodes need a rendezvous: give host:port of one of them")
        words += ["--nnodes", str(plan.nodes), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", rendezvous, "--rdzv-id", plan.name]
    else:
        words.append("--standalone")
    words += [
        "--max-restarts",
        "0",
        "-m",
        "cluster.torchrun",
        str(plan.config_path),
        *plan.overrides,
    ]
    return shlex.join([*words, f"cluster.address={address}"])
