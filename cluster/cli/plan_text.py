"""A plan as a terminal shows it, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.cli.text import pairs, table
from cluster.planning.nearest import Proposal
from cluster.planning.plan import Plan

GIB = 1 << 30


def describe_plan(plan: Plan, proposals: Sequence[Proposal]) -> str:
    """For a person."""
    shown = [pairs(_heading(plan))]
    head = ("where", "part", "GiB", "in all, GiB")
    shown.append(table(head, _memory_rows(plan), most=(34, 32, 12, 12), right=(2, 3)))
    shown.append(pairs(_times(plan)))
    lines = [f"warning: {warning}" for warning in plan.warnings]
    lines.append(f"bottleneck: {plan.bottleneck}")
    if plan.fits:
        lines.append("this plan fits")
    else:
        lines += [f"DOES NOT FIT: {problem.what}" for problem in plan.problems]
        lines += [f"  -> fits with {_proposed(proposal)}" for proposal in proposals]
        if not proposals:
            lines.append("  -> nothing near fits: fewer entries, or other machines")
    shown.append("\n".join(lines))
    return "\n\n".join(shown)


def _heading(plan: Plan) -> list[tuple[str, str]]:
    wanted = plan.wanted
    config, machines = wanted.config, wanted.machines
    memory = config.memory
    gpus = f"{machines.gpus} {plan.gpu.name}" if plan.gpu and machines.gpus else "no GPU"
    nodes = f"{machines.nodes} node{'s' if machines.nodes > 1 else ''}"
    rows = [
        (
            "memory",
            f"{wanted.entries:,} entries of {wanted.entry_tokens} tokens, keys of "
            f"{config.model.key_size} as {memory.key_dtype}, index {memory.index}",
        ),
        (
            "machines",
            f"{gpus} on {nodes} of {machines.cores} cores and {machines.host_bytes / GIB:,.0f} "
            f"GiB, {machines.network_bytes_per_s * 8 / 1e9:g} Gbit/s",
        ),
    ]
    if not wanted.local:
        where = "hosts" if not wanted.shards_on_gpu else f"{wanted.shard_gpus} GPUs"
        rows.append(
            (
                "placement",
                f"{config.runtime.trainers} trainers "
                f"({'GPU' if wanted.trains_on_gpu else 'CPU'}), {memory.shards} shards x "
                f"{memory.replicas} on {where}: {wanted.rows:,} entries each, "
                f"{wanted.shards_per_node} shards and {wanted.trainers_per_node} trainers a node",
            )
        )
    for name, rates in (("GPU rates", plan.gpu), ("host rates", plan.host)):
        if rates is not None:
            how = "measured" if rates.measured else "ESTIMATED"
            rows.append((name, f"{how}: {rates.source}"))
    return rows


def _memory_rows(plan: Plan) -> list[list[str]]:
    rows = []
    for place in plan.places:
        for i, part in enumerate(place.parts):
            name = f"{place.name} (x{place.count})" if i == 0 else ""
            rows.append([name, part.name, _gib(part.bytes), _gib(place.count * part.bytes)])
        if place.usable:
            free = "left" if place.fits else "LACKING"
            rows.append(["", f"{free} of {_gib(place.usable)}", _gib(abs(place.headroom)), ""])
    return rows


def _times(plan: Plan) -> list[tuple[str, str]]:
    search = plan.search
    rows = [
        (
            "search",
            f"{_time(search.alone_s)} for {search.batch} queries when alone "
            f"(shard {_time(search.shard_s)}, call {_time(search.call_s)}, network "
            f"{_time(search.network_s)})",
        )
    ]
    config = plan.wanted.config
    if plan.step is not None:
        step = plan.step
        how = "given" if step.given else f"reckoned from {step.flops / 1e12:,.0f} TFLOP"
        rows += [
            (
                "step",
                f"{_time(step.seconds)}: computing {_time(step.compute_s)} ({how}), gradients "
                f"{_time(step.reduce_s)}, waiting for the memory {_time(step.waiting_s)}",
            ),
            (
                "memory's overhead",
                f"{100 * step.overhead:.0f} % of a step of {step.queries:,} queries in "
                f"{config.accumulation_steps} passes; {search.joined:,} are answered at once",
            ),
        ]
    if plan.refresh is not None:
        refresh = plan.refresh
        keys = "keys by tables" if refresh.by_tables else "keys one by one"
        said = (
            f"{_time(refresh.seconds)}: tables {_time(refresh.tables_s)}, {keys} "
            f"{_time(refresh.keys_s)}, index {_time(refresh.index_s)}"
        )
        if refresh.disk_s:
            said += f", reading tokens {_time(refresh.disk_s)}"
        if refresh.every_s:
            said += (
                f"; one is due every {_time(refresh.every_s)}, so it is under way "
                f"{min(100, 100 * refresh.share):.0f} % of the time"
            )
        rows.append(("refresh", said))
    rows.append(
        ("start", f"{_time(plan.start_s)} until a shard answers, or is back when it was lost")
    )
    if plan.cost is not None:
        cost = plan.cost
        rows.append(
            (
                "cost",
                f"{cost.per_hour:,.2f} an hour, {cost.per_1000_steps:,.2f} for 1,000 steps, "
                f"{cost.run:,.0f} for {config.optim.steps:,} steps ({cost.run_hours:,.0f} hours)",
            )
        )
    return rows


def _proposed(proposal: Proposal) -> str:
    plan = proposal.plan
    tightest = min(
        (place for place in plan.places if place.usable), key=lambda p: p.headroom / p.usable
    )
    step = "" if plan.step is None else f", a step of {_time(plan.step.seconds)}"
    cost = "" if plan.cost is None else f", {plan.cost.per_1000_steps:,.2f} for 1,000 steps"
    return (
        f"{proposal.change} (a {tightest.name} then needs {_gib(tightest.needed)} of "
        f"{_gib(tightest.usable)} GiB{step}{cost})"
    )


def _gib(count: int) -> str:
    value = count / GIB
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def _time(seconds: float) -> str:
    if seconds == 0:
        return "0"
    if seconds < 1e-3:
        return f"{1e6 * seconds:,.0f} µs"
    if seconds < 1:
        return f"{1e3 * seconds:,.1f} ms"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def plan_as_json(plan: Plan, proposals: Sequence[Proposal] = ()) -> dict[str, Any]:
    """All figures as plain values, bytes and seconds."""
    from dataclasses import asdict

    wanted = plan.wanted
    told: dict[str, Any] = {
        "entries": wanted.entries,
        "entry_tokens": wanted.entry_tokens,
        "fits": plan.fits,
        "problems": [problem.what for problem in plan.problems],
        "warnings": list(plan.warnings),
        "bottleneck": plan.bottleneck,
        "machines": asdict(wanted.machines),
        "placement": {
            "trainers": 0 if wanted.local else wanted.config.runtime.trainers,
            "shards": wanted.config.memory.shards,
            "replicas": wanted.config.memory.replicas,
            "entries_per_shard": wanted.rows,
            "shards_per_node": wanted.shards_per_node,
            "shards_per_gpu": wanted.shards_per_gpu,
            "shard_gpus": wanted.shard_gpus,
            "trainers_per_node": wanted.trainers_per_node,
        },
        "rates": {
            name: {"name": rates.name, "source": rates.source, "measured": rates.measured}
            for name, rates in (("gpu", plan.gpu), ("host", plan.host))
            if rates is not None
        },
        "places": [
            {
                "name": place.name,
                "count": place.count,
                "usable_bytes": place.usable,
                "needed_bytes": place.needed,
                "bytes": {part.name: part.bytes for part in place.parts},
            }
            for place in plan.places
        ],
        "search": asdict(plan.search),
        "start_s": plan.start_s,
    }
    if plan.step is not None:
        told["step"] = asdict(plan.step) | {
            "seconds": plan.step.seconds,
            "overhead": plan.step.overhead,
        }
    if plan.refresh is not None:
        told["refresh"] = asdict(plan.refresh) | {
            "seconds": plan.refresh.seconds,
            "share": plan.refresh.share,
        }
    if plan.cost is not None:
        told["cost"] = asdict(plan.cost)
    told["proposals"] = [
        {"change": proposal.change, "plan": plan_as_json(proposal.plan)} for proposal in proposals
    ]
    return told
