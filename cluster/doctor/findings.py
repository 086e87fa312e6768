"""From what nodes say of themselves to what is wrong, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.doctor.facts import FAISS, PACKAGES, NodeFacts

Grade = Literal["ok", "warning", "problem"]

CLOCK_WARNING_S, CLOCK_PROBLEM_S = 2.0, 30.0
SHM_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        grade: how it is. what: was seen. fix: what to do; empty where all is well.
    """

    grade: Grade
    what: str
    fix: str = ""


def of_versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Every node must have the same packages."""
    first = nodes[0]
    missing = [name for name in PACKAGES if not first.versions[name]]
    faiss = [name for name in FAISS if first.versions[name]]
    if missing:
        yield Finding(
            grade="problem",
            what=f"{first.host}: not installed: {', '.join(missing)}",
            fix="install this project with its dependencies: make setup",
        )
    if not faiss:
        yield Finding(
            grade="warning",
            what=f"{first.host}: no FAISS is installed; memory.index must be flat",
            fix="install the extra cpu or gpu",
        )
    if len(faiss) > 1:
        yield Finding(
            grade="problem",
            what=f"{first.host}: faiss-cpu and faiss-gpu-cu12 are both installed, as one package",
            fix="uninstall both, then install the one that fits",
        )
    differing = [
        f"{name} {first.versions[name] or 'absent'} on {first.host}, "
        f"{node.versions[name] or 'absent'} on {node.host}"
        for node in nodes[1:]
        for name in PACKAGES
        if node.versions[name] != first.versions[name]
    ]
    pythons = {node.python.rsplit(".", 1)[0] for node in nodes}
    if len(pythons) > 1:
        differing.insert(0, f"Python {', '.join(sorted(pythons))}")
    if differing:
        yield Finding(
            grade="problem",
            what=f"nodes differ: {'; '.join(differing[:5])}{' ...' if differing[5:] else ''}",
            fix="give all nodes one image or one environment (constraints.txt pins it)",
        )
    elif not missing:
        shown = ", ".join(f"{name} {first.versions[name]}" for name in PACKAGES[:5])
        yield Finding(grade="ok", what=f"packages: {shown}, the same on {_nodes(nodes)}")


def of_clocks(nodes: Sequence[NodeFacts], asked: Sequence[float]) -> Iterator[Finding]:
    """Clocks are compared with the one that asked.

    Args:
        asked: when the answer of each node arrived, of this node's `time.time`.
    """
    off = [abs(node.clock - at) for node, at in zip(nodes, asked, strict=True)]
    worst = max(off)
    where = nodes[off.index(worst)].host
    if worst < CLOCK_WARNING_S:
        if len(nodes) > 1:
            yield Finding(grade="ok", what=f"clocks agree to {worst:.1f} s")
        return
    yield Finding(
        grade="problem" if worst >= CLOCK_PROBLEM_S else "warning",
        what=f"the clock of {where} is {worst:.0f} s off",
        fix="let NTP (chrony, systemd-timesyncd) set the clocks of all nodes",
    )


@dataclass(frozen=True, kw_only=True)
class Places:
    """Directories of a run.

    Attributes:
        needed: bytes that will be written to a directory. read_only: directories that it reads.
        token: that this node wrote into each of `needed`; empty: it could not.
    """

    needed: Mapping[str, int]
    read_only: frozenset[str] = frozenset()
    token: str = ""

    @property
    def paths(self) -> list[str]:
        return [*self.needed, *sorted(self.read_only - set(self.needed))]


def of_paths(nodes: Sequence[NodeFacts], places: Places) -> Iterator[Finding]:
    """What a run writes to must be one place for all nodes, with room; what it reads be there."""
    for at, here in enumerate(nodes[0].paths):
        path, views = here.path, [node.paths[at] for node in nodes]
        seen = list(zip(nodes, views, strict=True))
        if path not in places.needed:
            absent = [node.host for node, view in seen if not view.exists]
            if absent:
                yield _unseen(f"{path}: not there on {', '.join(absent[:4])}")
            else:
                yield Finding(grade="ok", what=f"{path}: there on {_nodes(nodes)}")
            continue
        blind = [n.host for n, view in seen if places.token and view.token != places.token]
        unwritable = [node.host for node, view in seen if not view.writable]
        free, wanted = min(view.free_bytes for view in views), places.needed[path]
        if unwritable:
            yield Finding(
                grade="problem",
                what=f"{path}: not writable on {', '.join(unwritable[:4])}",
                fix="give this user the right to write there, or choose another directory",
            )
        if blind:
            yield _unseen(f"{path}: what one node writes, {', '.join(blind[:4])} does not see")
        if free < wanted:
            yield Finding(
                grade="problem",
                what=f"{path}: {_gib(free)} free, the run's checkpoints take {_gib(wanted)}",
                fix="make room, lower checkpoint.keep, or choose another run.dir",
            )
        if not unwritable and not blind and free >= wanted:
            shared = f", one place for {_nodes(nodes)}" if places.token and len(nodes) > 1 else ""
            yield Finding(grade="ok", what=f"{path}: {_gib(free)} free{shared}")


def _unseen(what: str) -> Finding:
    return Finding(
        grade="problem",
        what=what,
        fix="put it on a filesystem that all nodes mount at this path",
    )


def of_machines(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """GPUs and shared memory."""
    kinds = sorted({_counted(node.gpus) for node in nodes})
    if len(kinds) > 1:
        yield Finding(
            grade="warning",
            what=f"nodes have different GPUs: {'; '.join(kind or 'none' for kind in kinds)}",
            fix="trainers go at the pace of the slowest: keep unlike nodes for the memory",
        )
    else:
        cpus = min(node.cpus for node in nodes)
        ram = min(node.ram_bytes for node in nodes)
        yield Finding(
            grade="ok",
            what=f"{_nodes(nodes)}: at least {cpus} CPUs, {_gib(ram)}, GPUs: {kinds[0] or 'none'}",
        )
    small = [node.host for node in nodes if 0 <= node.shm_bytes < SHM_BYTES]
    if small:
        yield Finding(
            grade="warning",
            what=f"/dev/shm has less than {SHM_BYTES >> 20} MiB on {', '.join(small[:4])}",
            fix="in a container mount a larger one (docker --shm-size, an emptyDir of Memory)",
        )


def _counted(gpus: Sequence[str]) -> str:
    return ", ".join(f"{gpus.count(kind)} {kind}" for kind in sorted(set(gpus)))


def _nodes(nodes: Sequence[NodeFacts]) -> str:
    return "this node" if len(nodes) == 1 else f"{len(nodes)} nodes"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
