"""The plan of a memory and its training: what lies where, how long things take, what is short.

A plan that does not fit says what is lacking; `nearest` finds what would fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.planning.memory_parts import Place, places
from cluster.planning.rates import Rates
from cluster.planning.timings import (
    RefreshTimes,
    SearchTimes,
    StepTimes,
    approximate_line,
    refresh_times,
    search_times,
    shard_rates,
    step_times,
)
from cluster.planning.wanted import Wanted
from cluster.resources import cpus_needed, gpus_needed

GIB = 1 << 30
PROCESS_START_S = 1.5  # to import, and to open a store (benchmarks/memory_at_size.py, resume)
FAR = 10  # times as many entries as were measured


@dataclass(frozen=True, kw_only=True)
class Cost:
    """In the currency of the price. `run`: of optim.steps."""

    per_hour: float
    per_1000_steps: float
    run: float
    run_hours: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why the plan cannot be carried out. `lacking`: by how much, as a share of what there is."""

    what: str
    lacking: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is told. `step`, `refresh` and `cost` are None where they do not apply.

    Attributes:
        start_s: until a shard answers: after it was begun, and after it was lost and came back.
    """

    wanted: Wanted
    gpu: Rates | None
    host: Rates
    places: tuple[Place, ...]
    search: SearchTimes
    step: StepTimes | None
    refresh: RefreshTimes | None
    start_s: float
    cost: Cost | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    bottleneck: str

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(
    wanted: Wanted,
    *,
    gpu: Rates | None,
    host: Rates,
    price: float | None = None,
    batch: int | None = None,
) -> Plan:
    """Reckon everything.

    Args:
        gpu: rates of one GPU; None where there is none. host: of all cores of a node.
        price: of a GPU and hour; without GPUs, of a node and hour.
        batch: queries of one search, where nothing is trained.

    Raises:
        ValueError: what is not known of the index on this device; shards on GPUs without any.
    """
    if gpu is None and (wanted.shards_on_gpu or wanted.trains_on_gpu):
        raise ValueError(
            "trainers or shards are on GPUs, but of no GPU the rates are known; give --gpu or "
            "the --calibration of one"
        )
    rates = shard_rates(wanted, gpu, host)
    search = search_times(wanted, rates, batch=batch)
    refreshed = wanted.config.memory.refresh != "off"
    gpu_bytes = gpu.memory_bytes if gpu is not None else 0
    where = places(wanted, gpu_bytes=gpu_bytes, batch=search.joined, refreshed=refreshed)
    node = next(place for place in where if place.name in ("node", "this process"))
    cached = node.wished <= node.usable or not node.usable
    step: StepTimes | None = None
    refresh: RefreshTimes | None = None
    if wanted.local:
        refresh = refresh_times(wanted, rates, host, step_s=0.0, cached=cached)
    else:
        known = refresh_times(wanted, rates, host, step_s=0.0, cached=cached)
        step = step_times(wanted, search, known.seconds, gpu, host)
        if refreshed:
            refresh = refresh_times(wanted, rates, host, step_s=step.seconds, cached=cached)
    problems = _problems(wanted, where)
    anew = refresh_times(wanted, rates, host, step_s=0.0, cached=False)
    start_s = PROCESS_START_S + anew.seconds
    return Plan(
        wanted=wanted,
        gpu=gpu,
        host=host,
        places=where,
        search=search,
        step=step,
        refresh=refresh,
        start_s=start_s,
        cost=None if step is None or price is None else _cost(wanted, step, price),
        problems=problems,
        warnings=(
            *_warnings(wanted, node, refresh, cached=cached),
            *_beyond(wanted, rates, start_s),
            *([_of_exact_search(wanted, gpu, host, batch)] if wanted.approximate else []),
        ),
        bottleneck=_bottleneck(search, step, refresh, problems),
    )


def _problems(wanted: Wanted, where: tuple[Place, ...]) -> tuple[Problem, ...]:
    found = [
        Problem(
            what=f"a {place.name} needs {place.needed / GIB:,.1f} GiB, but "
            f"{place.usable / GIB:,.1f} may be taken: most by {place.largest.name}",
            lacking=-place.headroom / place.usable,
        )
        for place in where
        if not place.fits
    ]
    config, machines = wanted.config, wanted.machines
    gpus = gpus_needed(config, "cuda" if wanted.trains_on_gpu else "cpu")
    if not wanted.local and gpus > machines.gpus:
        found.append(
            Problem(
                what=f"trainers and shards take {gpus:g} GPUs, but there are {machines.gpus}",
                lacking=gpus / max(1, machines.gpus) - 1,
            )
        )
    share = config.runtime.gpus_per_trainer + config.memory.gpus_per_shard
    if wanted.shares_gpus and share > 1 + 1e-9:
        found.append(
            Problem(
                what=f"runtime.gpus_per_trainer and memory.gpus_per_shard are {share:g} of a GPU: "
                "a trainer and a shard cannot share one; make the two 1 at most",
                lacking=share - 1,
            )
        )
    cores = machines.cores * machines.nodes
    if not wanted.local and (cpus := cpus_needed(config)) > cores:
        found.append(
            Problem(
                what=f"trainers' and shards' threads take {cpus:,} cores, but there are {cores:,}",
                lacking=cpus / cores - 1,
            )
        )
    if wanted.shards_on_gpu and config.memory.index == "pq":
        found.append(
            Problem(what='memory.index = "pq" is for CPUs: FAISS has no 4-bit codes on a GPU',
                    lacking=1.0)
        )  # fmt: skip
    return tuple(found)


def _warnings(
    wanted: Wanted, node: Place, refresh: RefreshTimes | None, *, cached: bool
) -> tuple[str, ...]:
    found = []
    memory = wanted.config.memory
    if not cached and node.fits:
        short = (node.wished - node.usable) / GIB
        found.append(
            f"{short:,.0f} GiB of a {node.name}'s tokens do not fit into its page cache: they are "
            "read from disk for a refresh, and for the answers of a search"
        )
    if refresh is not None and refresh.share > 1:
        found.append(
            f"a refresh takes {refresh.seconds:,.0f} s, but one is due every "
            f"{refresh.every_s:,.0f} s: keys are renewed every "
            f"{memory.refresh_every_steps * refresh.share:,.0f} steps instead"
        )
    if memory.refresh == "off" and not wanted.local:
        found.append("memory.refresh = off: keys stay those of the start, whatever is learned")
    idle = wanted.machines.gpus - math.ceil(gpus_needed(wanted.config, "cuda"))
    if wanted.trains_on_gpu and idle > 0:
        found.append(
            f"{idle} of {wanted.machines.gpus} GPUs have nothing to do, and are paid for: give "
            "more runtime.trainers or memory.shards, or fewer --gpus"
        )
    if memory.replicas > wanted.machines.nodes:
        found.append(
            f"{memory.replicas} replicas on {wanted.machines.nodes} nodes: two of a shard share one"
        )
    return tuple(found)


def _beyond(wanted: Wanted, rates: Rates, start_s: float) -> Iterator[str]:
    """What is longer than the settings wait, or larger than anything that was measured."""
    memory = wanted.config.memory
    if not wanted.local and memory.replicas == 1 and start_s > memory.deadline_s:
        yield (
            f"a shard that is lost answers again after {start_s:,.0f} s, but searches wait "
            f"memory.deadline_s = {memory.deadline_s:g} s for it, and training then starts again "
            "from a checkpoint: raise it, or give memory.replicas=2, or more shards"
        )
    line = approximate_line(wanted, rates)
    if line is not None and wanted.rows > FAR * line.entries:
        yield (
            f"the index's times are those of {line.entries:,} entries, extrapolated to "
            f"{wanted.rows:,} a shard: a guess"
        )


def _of_exact_search(wanted: Wanted, gpu: Rates | None, host: Rates, batch: int | None) -> str:
    """What an approximate index's recall is worth: without it, search is exact."""
    memory = replace(wanted.config.memory, index="flat", search_params="")
    exact = replace(wanted, config=replace(wanted.config, memory=memory))
    search = search_times(exact, shard_rates(exact, gpu, host), batch=batch)
    slower = f"a search takes {search.pass_s:,.1f} s"
    if not wanted.local:
        step = step_times(exact, search, 0.0, gpu, host)
        slower = f"a step takes {step.seconds:,.1f} s"
    return (
        "an approximate index answers only while its recall on the training's own queries is at "
        f"least memory.min_recall = {wanted.config.memory.min_recall:g}; until then, and below, "
        f"search is exact, and {slower}"
    )


def _cost(wanted: Wanted, step: StepTimes, price: float) -> Cost:
    per_hour = price * (wanted.machines.gpus or wanted.machines.nodes)
    hours = wanted.config.optim.steps * step.seconds / 3600
    return Cost(
        per_hour=per_hour,
        per_1000_steps=per_hour * 1000 * step.seconds / 3600,
        run=per_hour * hours,
        run_hours=hours,
    )


def _bottleneck(
    search: SearchTimes,
    step: StepTimes | None,
    refresh: RefreshTimes | None,
    problems: tuple[Problem, ...],
) -> str:
    """What to change first, and why."""
    if problems:
        worst = max(problems, key=lambda problem: problem.lacking)
        return f"memory or machines: {worst.what}"
    if refresh is not None and refresh.share > 1:
        parts = {
            "making keys": refresh.keys_s,
            "reading tokens from disk": refresh.disk_s,
            "filling the index": refresh.index_s,
            "building tables": refresh.tables_s,
            "publishing weights": refresh.weights_s,
        }
        most = max(parts, key=lambda name: parts[name])
        return (
            f"the refresh: it takes {refresh.share:.1f} times the time between two, most of it "
            f"{most} ({parts[most]:,.1f} s)"
        )
    if step is None:
        return f"the search: {search.by}, {1e3 * search.shard_s:,.1f} ms of a batch"
    spent = {
        "computing": step.compute_s,
        "waiting for the memory": step.waiting_s + step.sync_refresh_s,
        "reducing gradients": step.reduce_s,
    }
    most = max(spent, key=lambda name: spent[name])
    reason = f"{100 * spent[most] / step.seconds:.0f} % of a step is {most}"
    if most != "waiting for the memory":
        return reason
    network = search.pass_s - search.call_s - search.shard_s
    by = "the network" if search.network_s > search.shard_s and network > 0 else search.by
    return f"{reason}, and of that most is {by}"
