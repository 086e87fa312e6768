"""What the simulation says of sizes that no machine here has: shards, trainers, replicas, hedging.

One memory of 16,777,216 entries is cut into 1 to 4,096 shards, asked by 1 to 1,024 trainers. Shards
have one core each, of the measured machine; the rest is assumed and printed. The peer of a row is
the row with the defaults: `fan_in` 16 (as with one replica), hedging at p95, one replica. Failures
are told of shards of several sizes, as a larger one is longer away.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import argument_parser, begin, finish, note, table

from cluster.simulation.outcome import Outcome, shown, simulate
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import MEASURED, ServiceTimes, read_service_times

ENTRIES = 1 << 24
DIRECT = 1 << 20  # a fan_in with which no relay is ever asked
RELAYED = 16  # one with which more shards than these are asked by way of relays
REQUESTS_AT_MOST = 2_000_000  # in all steps of one scenario
NETWORKED = Scenario(
    entries=ENTRIES,
    batch=32,
    compute_s=0.5,
    jitter=0.03,
    latency_s=50e-6,
    bandwidth_bytes_s=3.125e9,
    gradient_bytes=4e8,
)


def played(service: ServiceTimes, *, most: int = 120, **changes: Any) -> Outcome:
    """One scenario, with as many steps as its size allows, at most `most`."""
    scenario = replace(NETWORKED, **changes)
    steps = REQUESTS_AT_MOST // (scenario.trainers * scenario.shards)
    steps = max(3, min(most, steps))
    began = time.perf_counter()
    outcome = simulate(replace(scenario, steps=steps, warmup=steps // 3), service, "statistics")
    note(f"{changes}: {outcome.step_ms:.0f} ms a step ({time.perf_counter() - began:.1f} s)")
    return outcome


def _ms(outcome: Outcome) -> str:
    """p50 / p99; what is beyond the deadline fails in the real system, however long it takes."""
    limit_s = outcome.scenario.deadline_s
    told = [
        f"> {limit_s:g} s" if milliseconds > 1e3 * limit_s else shown(milliseconds)
        for milliseconds in (outcome.search_p50_ms, outcome.search_p99_ms)
    ]
    return told[0] if outcome.search_p50_ms > 1e3 * limit_s else " / ".join(told)


def _cell(outcome: Outcome) -> str:
    """The same, and what it adds to a step where no search fails."""
    if outcome.late or outcome.overhead is None:
        return _ms(outcome)
    return f"{_ms(outcome)} (+{shown(100 * outcome.overhead)} %)"


def by_size(service: ServiceTimes, args: argparse.Namespace) -> tuple[str, list[Outcome]]:
    """Shards by trainers: p50 and p99 of a search, and what it adds to a step."""
    outcomes = {
        (shards, trainers): played(service, shards=shards, trainers=trainers)
        for shards in args.shards
        for trainers in args.trainers
    }
    rows = [[str(shards)] for shards in args.shards]
    for row, shards in zip(rows, args.shards, strict=True):
        for trainers in args.trainers:
            row.append(_cell(outcomes[shards, trainers]))
    heads = ["shards", *(f"{count} trainers" for count in args.trainers)]
    return table(heads, rows), list(outcomes.values())


def by_fan_in(service: ServiceTimes, args: argparse.Namespace) -> tuple[str, list[Outcome]]:
    """Relays or none, by shards and trainers."""
    rows, outcomes = [], []
    for shards in (count for count in args.shards if count > 1):
        row = [str(shards)]
        for trainers in args.fan_in_trainers:
            pair = [
                played(service, shards=shards, trainers=trainers, fan_in=fan_in)
                for fan_in in (DIRECT, 2)
            ]
            outcomes += pair
            row += [_ms(outcome) for outcome in pair]
        rows.append(row)
    heads = ["shards"]
    for trainers in args.fan_in_trainers:
        heads += [f"{trainers} trainers, direct", f"{trainers}, relays"]
    return table(heads, rows), outcomes


def by_replicas(service: ServiceTimes, args: argparse.Namespace) -> tuple[str, list[Outcome]]:
    """Replicas and hedging, with stragglers and without."""
    rows, outcomes = [], []
    for shards in args.replica_shards:
        for share in args.straggler_shares:
            for replicas in args.replicas:
                ways: list[dict[str, Any]] = [{"hedge": "off", "fan_in": RELAYED}]
                if replicas > 1:
                    ways.append({"hedge": "p95", "fan_in": RELAYED})
                    if shards > RELAYED:
                        ways.append({"hedge": "p95", "fan_in": DIRECT})
                told = [
                    played(
                        service,
                        shards=shards,
                        trainers=8,
                        replicas=replicas,
                        straggler_share=share,
                        most=400,
                        **way,
                    )
                    for way in ways
                ]
                outcomes += told
                cells = [_cell(one) for one in told]
                name = f"{shards} shards, {100 * share:g} % stragglers, {replicas} replicas"
                rows.append([name, *cells, *[""] * (3 - len(cells))])
    return table(["", "no hedging", "hedging at p95", "the same without relays"], rows), outcomes


def by_failures(service: ServiceTimes, args: argparse.Namespace) -> tuple[str, list[Outcome]]:
    """Goodput with failures of the memory, by shards, their size, and replicas."""
    rows, outcomes = [], []
    for shards in [*args.replica_shards, max(args.shards)]:
        for entries in args.shard_entries:
            row = [str(shards), f"{entries:,}"]
            for replicas in args.replicas:
                outcome = played(
                    service,
                    most=6,
                    shards=shards,
                    entries=shards * entries,
                    trainers=8,
                    replicas=replicas,
                    replica_mtbf_h=args.replica_mtbf_h,
                    memory_node_mtbf_h=args.node_mtbf_h,
                    hours=1000.0,
                )
                outcomes.append(outcome)
                stopped = outcome.long_run.stopped_s / outcome.long_run.seconds
                row.append(f"{100 * outcome.goodput_share:.2f} % ({100 * stopped:.3f} %)")
            rows.append([*row, f"{outcomes[-1].scenario.replica_back_s:.1f} s"])
    heads = ["shards", "entries of each", *(f"{r} replicas" for r in args.replicas), "back after"]
    return table(heads, rows), outcomes


def draw(directory: Path, sizes: list[Outcome], replicas: list[Outcome]) -> None:
    """`simulated_scale.png` and `.svg`: latency by size, and what hedging does."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "pluglm"  # the same file from the same figures
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for trainers in sorted({one.scenario.trainers for one in sizes}):
        line = [one for one in sizes if one.scenario.trainers == trainers]
        left.plot(
            [one.scenario.shards for one in line],
            [one.search_p99_ms for one in line],
            marker="o",
            label=f"{trainers:,} trainer{'s' if trainers > 1 else ''}",
        )
    deadline_s = NETWORKED.deadline_s
    above = f"{deadline_s:g} s: above it searches fail"
    left.axhline(1e3 * deadline_s, color="black", linestyle=":", label=above)
    left.set(xscale="log", yscale="log", xlabel="shards", ylabel="p99 of a search, ms")
    left.set_title(f"{ENTRIES / 1e6:.0f} million entries, one replica")
    left.set_ylim(bottom=0.2)  # room for the legend below the lines
    left.legend(loc="lower left", fontsize="small")
    slowed = [one for one in replicas if one.scenario.straggler_share]
    names = [
        f"{one.scenario.shards}, {one.scenario.replicas}, {one.scenario.hedge}"
        + (", direct" if one.scenario.fan_in == DIRECT else "")
        for one in slowed
    ]
    right.barh(names, [one.search_p99_ms for one in slowed])
    right.invert_yaxis()
    right.set(xlabel="p99 of a search, ms", xscale="log")
    right.set_title("shards, replicas, hedging; 8 trainers, stragglers")
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / "simulated_scale.png", dpi=120)
    figure.savefig(directory / "simulated_scale.svg", metadata={"Date": None})


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    sizes = [1, 4, 16, 64, 256, 1024, 4096]
    parser.add_argument("--service", type=Path, default=MEASURED, metavar="FILE")
    parser.add_argument("--shards", type=int, nargs="+", default=sizes)
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--fan-in-trainers", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--replica-shards", type=int, nargs="+", default=[16, 256])
    parser.add_argument(
        "--shard-entries", type=int, nargs="+", default=[4096, 1_000_000, 10_000_000],
        help="of each shard, where failures are told",
    )  # fmt: skip
    parser.add_argument("--straggler-shares", type=float, nargs="+", default=[0.0, 0.01])
    parser.add_argument("--replica-mtbf-h", type=float, default=2000.0)
    parser.add_argument("--node-mtbf-h", type=float, default=10_000.0)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw figures there")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    facts = begin()
    service = read_service_times(args.service)
    print(
        f"{NETWORKED}\nSearches: p50 / p99 in ms, or beyond the deadline, by which they fail; in "
        "brackets what they add to a step. Failures: useful steps of those without failures, in "
        "brackets the share of time without a shard.\n"
    )
    told: dict[str, list[Outcome]] = {}
    for name, tell in (
        ("size", by_size), ("fan-in", by_fan_in), ("replicas", by_replicas),
        ("failures", by_failures),
    ):  # fmt: skip
        text, told[name] = tell(service, args)
        print(f"By {name}:\n\n{text}\n", flush=True)
    if args.plot is not None:
        draw(args.plot, told["size"], told["replicas"])
    figures = {name: [one.as_dict() for one in outcomes] for name, outcomes in told.items()}
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
