"""`pluglm simulate`: what a cluster would do, before it exists."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.cli.command import Command, UsageError, count_of_entries, positive
from cluster.cli.memory_options import whole_number
from cluster.cli.text import pairs

# Name of the field, how its words are read, what stands for them, its default, what it means.
Option = tuple[str, Callable[[str], Any], str, str, str]


def _number(text: str) -> float:
    """An argument that is a finite number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
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


# Each is a field of `cluster.simulation.scenario.Scenario`, which has the limits; the defaults are
# written here once more, as reading them there would import the memory for a help text.
_MEMORY: tuple[Option, ...] = (
    ("shards", positive, "N", "4", "parts that the memory is cut into"),
    ("replicas", positive, "R", "1", "copies of each shard, on different nodes"),
    ("entries", count_of_entries, "N", "1000000", "of the whole memory, such as 1e9"),
    ("top_k", positive, "K", "5", "entries that a query gets"),
    ("entry_tokens", positive, "S", "64", "tokens of an entry, which make a reply larger"),
    (
        "fan_in", positive, "N", "16 with one replica, 256 with more",
        "with more shards than this, some of them ask the others for a trainer (relays)",
    ),
    (
        "hedge", _hedge, "p95|off|S", "p95",
        "when a second replica is asked: after the p95 of recent answers, never (off), or after S "
        "seconds",
    ),
    ("deadline_s", _number, "S", "60", "seconds after which a search fails (memory.deadline_s)"),
    ("queue_limit", positive, "N", "256", "searches that may wait at a replica"),
    ("refresh_every_steps", whole_number, "N", "0", "steps between refreshes of the keys; 0: none"),
    (
        "straggler_share", _number, "P", "0",
        "share, 0 to 1, of a shard's searches that chance makes slower",
    ),
    (
        "straggler_shape", _number, "A", "1.5",
        "how extreme such slowness is, a number above 1 without unit: a straggler takes 1 + x "
        "times as long, x of the Pareto distribution of this shape; the nearer to 1, the more are "
        "very slow",
    ),
)  # fmt: skip
_TRAINING: tuple[Option, ...] = (
    ("trainers", positive, "T", "4", "data-parallel processes that train"),
    ("batch", positive, "B", "32", "queries of one search of a trainer"),
    ("searches_per_step", positive, "N", "1", "memory layers times micro-batches"),
    ("steps", positive, "N", "200", "that are simulated one by one"),
    ("warmup", whole_number, "N", "a tenth of them", "first steps that the figures leave out"),
    (
        "compute_s", _number, "S", "as measured",
        "seconds of a trainer's step without its searches",
    ),
    (
        "compute_before", _number, "P", "0.3",
        "share, 0 to 1, of compute_s that comes before the last search",
    ),
    (
        "jitter", _number, "P", "0.03",
        "share, 0 to 1, of compute_s by which trainers' steps differ; not of measured ones",
    ),
    ("gradient_bytes", _number, "N", "0", "bytes that each trainer reduces per step"),
)  # fmt: skip
_MACHINES: tuple[Option, ...] = (
    ("latency_s", _number, "S", "50e-6", "seconds of a message between two machines, one way"),
    ("bandwidth_bytes_s", _number, "N", "1.25e9", "bytes per second of a node's network card"),
    ("shared_cores", whole_number, "N", "0", "that all processes share; 0: each has its own"),
)
_FAILURES: tuple[Option, ...] = (
    ("replica_mtbf_h", _number, "H", "0", "hours between failures of one replica; 0: never"),
    ("memory_node_mtbf_h", _number, "H", "0", "hours between those of one node of shards"),
    ("trainer_mtbf_h", _number, "H", "0", "hours between those of one trainer"),
    ("trainer_node_mtbf_h", _number, "H", "0", "hours between those of one node of trainers"),
    ("shards_per_node", positive, "N", "8", "replicas on one node"),
    ("trainers_per_node", positive, "N", "8", "trainers on one node"),
    (
        "replica_restart_s", _number, "S", "5.2",
        "seconds from a replica's death until an empty one would serve again",
    ),
    (
        "restore_s_per_entry", _number, "S", "3.54e-6",
        "seconds more for each entry of its shard, which it reads and encodes",
    ),
    (
        "trainer_restart_s", _number, "S", "7.8",
        "seconds from a trainer's death until all train again, with an empty memory",
    ),
    (
        "renew_s_per_entry", _number, "S", "4.91e-6",
        "seconds more for each entry of a shard, whose keys are made anew before",
    ),
    ("detection_s", _number, "S", "14", "seconds until Ray notices the loss of a node"),
    ("checkpoint_every_steps", positive, "N", "1000", "steps between checkpoints"),
    ("checkpoint_s", _number, "S", "0", "seconds that training stands still for one"),
    ("hours", _number, "H", "24", "of the run whose goodput is told"),
)  # fmt: skip
_GROUPS = (
    ("the memory", _MEMORY),
    ("training", _TRAINING),
    ("machines", _MACHINES),
    ("failures", _FAILURES),
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    for title, options in _GROUPS:
        group = parser.add_argument_group(title)
        for name, kind, metavar, default, text in options:
            flag = f"--{name.replace('_', '-')}"
            told = f"{text} (default: {default})"
            group.add_argument(flag, type=kind, metavar=metavar, default=None, help=told)
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
        help="play single requests, or draw whole steps (default: auto, by size)",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of what is drawn (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run(options: argparse.Namespace) -> int:
    try:
        import simpy  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            'the simulation needs SimPy: install it with pip install "pluglm[simulation]"'
        ) from error
    from cluster.simulation.outcome import simulate
    from cluster.simulation.refusals import BadScenario
    from cluster.simulation.scenario import Scenario
    from cluster.simulation.service import MEASURED, read_service_times

    names = [name for _, group in _GROUPS for name, *_ in group]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        scenario = Scenario(seed=options.seed, **given)
        service = read_service_times(options.service or MEASURED)
        outcome = simulate(scenario, service, options.method)
    except BadScenario as error:
        raise UsageError(error.as_options()) from error
    if options.json:
        print(json.dumps(outcome.as_dict(), indent=1, allow_nan=False))
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
relays, hedging, refresh beside training, recovery) with times measured on real machines, of
keys of 128 numbers. docs/simulation.md says how far it was found right, what it leaves out,
and when to use `pluglm plan` instead.""",
    example="""\
pluglm simulate --shards 64 --replicas 2 --trainers 32 --entries 100000000 --compute-s 0.5
pluglm simulate --shards 256 --trainers 128 --replica-mtbf-h 2000 --trainer-mtbf-h 5000 --hours 72
pluglm simulate --shards 8 --service here.json --json""",
    configure=_arguments,
    run=_run,
)
