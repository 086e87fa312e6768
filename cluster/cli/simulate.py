"""`pluglm simulate`: what a cluster would do, before it exists."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.text import pairs

Option = tuple[str, Callable[[str], Any], str, str]


def _number(text: str) -> float:
    """An argument that is a finite number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return number


def _hedge(text: str) -> float | str:
    if text in ("p95", "off"):
        return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give p95, off, or seconds above 0")
    return seconds


# Each is a field of `cluster.simulation.scenario.Scenario`, which has the defaults and the limits.
_MEMORY: tuple[Option, ...] = (
    ("shards", positive, "N", "of the memory"),
    ("replicas", positive, "R", "of each shard"),
    ("entries", positive, "N", "of the whole memory"),
    ("top_k", positive, "K", "entries per query"),
    ("entry_tokens", positive, "S", "tokens of an entry"),
    ("fan_in", positive, "N", "with more shards than this, relays ask for the trainers"),
    ("hedge", _hedge, "p95|off|S", "when a second replica is asked"),
    ("queue_limit", positive, "N", "searches that may wait at a replica"),
    ("refresh_every_steps", _whole, "N", "steps between refreshes of the keys; 0: none"),
    ("straggler_share", _number, "P", "of the searches of a shard that are slowed"),
    ("straggler_shape", _number, "A", "of the Pareto distribution of how much"),
)
_TRAINING: tuple[Option, ...] = (
    ("trainers", positive, "T", "data-parallel"),
    ("batch", positive, "B", "queries of one search of a trainer"),
    ("searches_per_step", positive, "N", "memory layers times micro-batches"),
    ("steps", positive, "N", "that are simulated one by one"),
    ("warmup", _whole, "N", "of them, left out of the figures"),
    ("compute_s", _number, "S", "of a step without its searches; without it, as measured"),
    ("compute_before", _number, "P", "share of it before the last search"),
    ("jitter", _number, "P", "of compute_s, as a share of it"),
    ("gradient_bytes", _number, "N", "that each trainer reduces per step"),
)
_MACHINES: tuple[Option, ...] = (
    ("latency_s", _number, "S", "one way between two machines"),
    ("bandwidth_bytes_s", _number, "N", "of a machine's network card"),
    ("shared_cores", _whole, "N", "that all processes share; 0: each has its own"),
)
_FAILURES: tuple[Option, ...] = (
    ("replica_mtbf_h", _number, "H", "hours between failures of one replica; 0: never"),
    ("memory_node_mtbf_h", _number, "H", "of one node of shards"),
    ("trainer_mtbf_h", _number, "H", "of one trainer"),
    ("trainer_node_mtbf_h", _number, "H", "of one node of trainers"),
    ("shards_per_node", positive, "N", "replicas on one node"),
    ("trainers_per_node", positive, "N", "trainers on one node"),
    ("replica_restart_s", _number, "S", "until a replica serves again, less its entries"),
    ("restore_s_per_entry", _number, "S", "more for each entry of it"),
    ("trainer_restart_s", _number, "S", "until all train again"),
    ("detection_s", _number, "S", "until Ray notices the loss of a node"),
    ("checkpoint_every_steps", positive, "N", "steps between checkpoints"),
    ("checkpoint_s", _number, "S", "that training stands still for one"),
    ("hours", _number, "H", "of the run whose goodput is told"),
)
_GROUPS = (
    ("the memory", _MEMORY),
    ("training", _TRAINING),
    ("machines", _MACHINES),
    ("failures", _FAILURES),
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    for title, options in _GROUPS:
        group = parser.add_argument_group(title)
        for name, kind, metavar, text in options:
            flag = f"--{name.replace('_', '-')}"
            group.add_argument(flag, type=kind, metavar=metavar, default=None, help=text)
    parser.add_argument(
        "--service",
        type=Path,
        metavar="FILE.json",
        help="measured times, as benchmarks/simulation_check.py writes them (default: those of a "
        "machine with two cores that come with pluglm)",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "events", "statistics"),
        default="auto",
        help="play single requests, or draw whole steps; auto: by size",
    )
    parser.add_argument("--seed", type=_whole, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run(options: argparse.Namespace) -> int:
    try:
        import simpy  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            'the simulation needs SimPy: install it with pip install "pluglm[simulation]"'
        ) from error
    from cluster.simulation.outcome import simulate
    from cluster.simulation.scenario import Scenario
    from cluster.simulation.service import MEASURED, read_service_times

    names = [name for _, group in _GROUPS for name, *_ in group]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    scenario = Scenario(seed=options.seed, **given)
    service = read_service_times(options.service or MEASURED)
    outcome = simulate(scenario, service, options.method)
    if options.json:
        print(json.dumps(outcome.as_dict(), indent=1))
    else:
        print(pairs(outcome.rows()))
    return 0


SIMULATE = Command(
    name="simulate",
    summary="foresee step times, search latency and goodput of a cluster",
    description="""\
Foresee what a cluster of trainers and memory shards would do: what the memory adds to a
step, how long searches take, how old keys get, and how many useful steps are made while
replicas, trainers and nodes fail. It follows the system's own rules (joined searches,
relays, hedging, refresh beside training, recovery) with times measured on real machines;
docs/simulation.md says how far it was found right, and what it leaves out.""",
    example="""\
pluglm simulate --shards 64 --replicas 2 --trainers 32 --entries 100000000 --compute-s 0.5
pluglm simulate --shards 256 --trainers 128 --replica-mtbf-h 2000 --trainer-mtbf-h 5000 --hours 72
pluglm simulate --shards 8 --service here.json --json""",
    configure=_arguments,
    run=_run,
)
