"""How many files and sockets a process of a run may have open, and whether a node allows that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.config import PretrainConfig
from cluster.doctor.facts import NodeFacts
from cluster.doctor.findings import Finding

# Of a connection to a shard: two of ZeroMQ's sockets for its state, one for messages, and TCP's.
PER_CONNECTION = 4
OF_A_PROCESS = 512  # a worker's own, of Ray, torch and the run, with room
RAY_WARNS_BELOW = 4096


def open_files_needed(config: PretrainConfig) -> int:
    """More than any process of a run has open; 0 where the memory is a server's, whose shards are
    not in the configuration.

    A trainer has a connection to every replica of every shard in each of its threads that search. A
    shard is at the other end of all trainers' connections, and connected to fewer others.
    """
    memory, runtime = config.memory, config.runtime
    if memory.server:
        return 0
    searching = runtime.retrieval_chunks + 1
    connections = PER_CONNECTION * memory.shards * memory.replicas + runtime.trainers
    return OF_A_PROCESS + searching * connections


def of_open_files(nodes: Sequence[NodeFacts], needed: int) -> Iterator[Finding]:
    """Whether processes may have as many files and sockets open as they need.

    Args:
        needed: of a process of the run; 0: not known.
    """
    least = min(nodes, key=lambda node: node.open_files)
    what = f"{least.host}: a process may have {least.open_files:,} files and sockets open"
    fix = (
        "raise it where Ray is started: `ulimit -n 65536` before `ray start`, LimitNOFILE= of a "
        "systemd unit, docker --ulimit nofile="
    )
    if least.open_files < needed:
        yield Finding(grade="problem", what=f"{what}, the run takes up to {needed:,}", fix=fix)
    elif least.open_files < RAY_WARNS_BELOW:
        more = f"Ray asks for {RAY_WARNS_BELOW:,}, many shards for more"
        yield Finding(grade="warning", what=f"{what}; {more}", fix=fix)
    else:
        yield Finding(grade="ok", what=what)
