"""The nearest plans that fit, where one does not: one change, or else two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from cluster.planning.plan import Plan
from cluster.planning.wanted import Wanted, placed

MOST_GROWTH = 1 << 8  # times as many GPUs or nodes are not looked beyond
MOST_SHOWN = 3

Reckon = Callable[[Wanted], Plan]
Change = Callable[[Wanted], Wanted]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to change, in words and as overrides or options, and the plan that comes of it."""

    change: str
    plan: Plan


def nearest(wanted: Wanted, reckon: Reckon) -> list[Proposal]:
    """Up to three changes that make the plan fit; two at once only where no single one does."""
    single = list(_changes(wanted))
    found = [p for name, change in single if (p := _tried(name, change, wanted, reckon))]
    if not found:
        for (one, first), (other, second) in combinations(single, 2):
            proposal = _tried(f"{one} {other}", _both(first, second), wanted, reckon)
            found += [proposal] if proposal else []
    found.sort(key=lambda proposal: proposal.plan.step.seconds if proposal.plan.step else 0.0)
    found = found or [p for p in [_grown(wanted, reckon, dtype="int8")] if p]
    grown = _grown(wanted, reckon, dtype=None)
    return [*found[:MOST_SHOWN], *([grown] if grown else [])]


def _changes(wanted: Wanted) -> Iterator[tuple[str, Change]]:
    memory, runtime = wanted.config.memory, wanted.config.runtime
    if memory.key_dtype != "int8":
        yield "memory.key_dtype=int8", _memory(key_dtype="int8")
    if memory.replicas > 1:
        yield "memory.replicas=1", _memory(replicas=1)
    if wanted.shards_on_gpu:
        yield "--shards-on host", lambda w: placed(w, shards_on="host")
    if wanted.approximate:
        yield "memory.index=flat", _memory(index="flat", search_params="")
    if runtime.zero_stage < 2 and not wanted.local:
        yield "runtime.zero_stage=2", _runtime(zero_stage=2)
    if not runtime.activation_checkpointing and not wanted.local:
        yield (
            "runtime.activation_checkpointing=true",
            _runtime(activation_checkpointing=True),
        )
    smaller = wanted.config.micro_batch_size // 4
    if smaller and not wanted.local and wanted.config.micro_batch_size % 4 == 0:
        yield f"runtime.micro_batch_size={smaller}", _runtime(micro_batch_size=smaller)
    if memory.refresh != "off" and not wanted.local:
        yield "memory.refresh=off", _memory(refresh="off", max_staleness_steps=0)


def _grown(wanted: Wanted, reckon: Reckon, *, dtype: str | None) -> Proposal | None:
    """The fewest GPUs, or nodes, with which it fits; the new ones hold shards and train alike."""
    if wanted.local:
        return None
    start = wanted if dtype is None else _memory(key_dtype=dtype)(wanted)
    on = "gpu" if wanted.shards_on_gpu else "host"
    gpus = wanted.machines.gpus
    few, many = 1, 0
    unit = gpus or wanted.machines.nodes
    times = 2
    while times <= MOST_GROWTH:
        if _fits(_with(start, unit * times, on, gpus=bool(gpus)), reckon):
            many = unit * times
            break
        few = unit * times
        times *= 2
    if not many:
        return None
    few = max(few, unit)
    while many - few > max(1, unit // 4):
        middle = (few + many) // 2
        if _fits(_with(start, middle, on, gpus=bool(gpus)), reckon):
            many = middle
        else:
            few = middle
    grown = _with(start, many, on, gpus=bool(gpus))
    assert grown is not None
    what = f"--gpus {many}" if gpus else f"--nodes {many}"
    change = f"{what} --shards-on {on}" + (f" memory.key_dtype={dtype}" if dtype else "")
    return Proposal(change=change, plan=reckon(grown))


def _with(wanted: Wanted, count: int, on: str, *, gpus: bool) -> Wanted | None:
    machines = wanted.machines
    more = machines.with_gpus(count) if gpus else machines.with_nodes(count)
    try:
        return placed(replace(wanted, machines=more), shards_on=on)
    except ValueError:
        return None


def _fits(wanted: Wanted | None, reckon: Reckon) -> bool:
    if wanted is None:
        return False
    try:
        return reckon(wanted).fits
    except ValueError:
        return False


def _tried(change: str, make: Change, wanted: Wanted, reckon: Reckon) -> Proposal | None:
    try:
        plan = reckon(make(wanted))
    except ValueError:  # the settings do not go together, or nothing is known of them
        return None
    return Proposal(change=change, plan=plan) if plan.fits else None


def _both(first: Change, second: Change) -> Change:
    return lambda wanted: second(first(wanted))


def _memory(**values: Any) -> Change:
    return lambda w: replace(w, config=replace(w.config, memory=replace(w.config.memory, **values)))


def _runtime(**values: Any) -> Change:
    return lambda w: replace(
        w, config=replace(w.config, runtime=replace(w.config.runtime, **values))
    )
