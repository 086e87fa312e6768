"""A batch script for Slurm: a Ray for the job, the run in it, a requeue when it asks for one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from cluster.errors import LaunchError
from cluster.launch.plan import LaunchPlan
from cluster.stop import REQUEUE

_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
_OPTION = re.compile(r"--[a-z][a-z-]*(=\S+)?")

_SCRIPT = """\
#!/usr/bin/env bash
{options}
# One Ray node per task; the driver runs on the first. Made by `pluglm launch slurm`.
set -euo pipefail
cd {directory}
{setup}
# Only this job's processes may talk to its Ray.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
export RAY_AUTH_TOKEN

# Slurm's warning before the time is over, and its order to go, are the run's to answer.
run=""
told=""
trap 'told=yes; [ -z "$run" ] || kill -USR1 "$run" 2>/dev/null || true' USR1 TERM

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
port=$((20000 + SLURM_JOB_ID % 20000))
ray_node=(ray start --block --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats)

# A busy machine starves the memory's shards at Ray's own niceness.
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task={cpus} --nodelist="$head" \\
  "${{ray_node[@]}}" --head \\
  --node-ip-address="$head" --port="$port" --include-dashboard=false \\
  --system-config='{{"worker_niceness":0}}' &
pluglm doctor --address "$head:$port" --nodes 1 --wait 300
if [ {nodes} -gt 1 ]; then
  srun --overlap --nodes={others} --ntasks={others} --cpus-per-task={cpus} --exclude="$head" \\
    "${{ray_node[@]}}" \\
    --address="$head:$port" &
fi
# Everything is looked at before hours are spent.
pluglm doctor {config} --address "$head:$port" --nodes {nodes} --wait 300

if [ -n "$told" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit {requeue}
fi
{command} &
run=$!
while kill -0 "$run" 2>/dev/null; do
  wait "$run" || true
done
code=0
wait "$run" || code=$?
if [ "$code" -eq {requeue} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def slurm_script(
    plan: LaunchPlan,
    *,
    time: str = "24:00:00",
    warn_s: int = 180,
    options: Sequence[str] = (),
) -> str:
    """The script for `sbatch`.

    Args:
        time: limit of the job, as Slurm writes it.
        warn_s: seconds before it at which the run is told to write its checkpoint.
        options: more of sbatch's, such as "--partition=gpu".

    Raises:
        LaunchError: a time or an option that sbatch would not take; a warning that is too short.
    """
    if not _TIME.fullmatch(time):
        raise LaunchError(f"time {time!r}: give minutes, HH:MM:SS or D-HH:MM:SS")
    for option in options:
        if not _OPTION.fullmatch(option):
            raise LaunchError(f"option {option!r}: give one of sbatch's as --name=value")
    if warn_s <= plan.config.recovery.grace_s:
        raise LaunchError(
            f"a warning of {warn_s} s is no more than recovery.grace_s = "
            f"{plan.config.recovery.grace_s:g}: the checkpoint would come too late"
        )
    head = {
        "job-name": plan.name,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": plan.cpus,
        **({"gpus-per-node": plan.gpus} if plan.gpus else {}),
        "time": time,
        "signal": f"B:USR1@{warn_s}",
        "output": f"{plan.name}-%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in head.items()]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in options)]
    words = shlex.join([str(plan.config_path), *plan.overrides])
    return _SCRIPT.format(
        options="\n".join(lines),
        directory=shlex.quote(str(plan.directory)),
        setup="\n".join(plan.setup),
        cpus=plan.cpus,
        gpus=plan.gpus,
        nodes=plan.nodes,
        others=plan.nodes - 1,
        config=words,
        command=plan.shell_command('cluster.address="$head:$port"'),
        requeue=REQUEUE,
    )
