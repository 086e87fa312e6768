"""Seconds from a death to the next step: of a trainer, of a shard's process, and of whole nodes.

`pluglm pretrain` runs on several Ray nodes of this machine, which share its cores: one for the
trainers, two for the memory's shards; before a node dies, another of its kind joins. What dies gets
a SIGKILL, a node with all its processes. Told is the longest time without a step from then on, and
the longest time that another client of the same memory, which searches all the while, got no
answer. The peer is the longest of both in some seconds just before, when nothing died.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from harness import REPOSITORY, Spread, argument_parser, begin, finish, note, positive, table
from invented import write_documents
from ray.cluster_utils import Cluster
from recovery_watch import Answers, Steps
from watch import PLUGLM

from cluster.presets import preset
from memory_server.actors.client import RayMemory
from trainer.corpus.build import build_corpus

ENTRY_TOKENS = 64
STORE_BYTES = 128 * 2**20
START_S, RECOVER_S, AFTER_S = 600.0, 300.0, 10.0
DEATHS = ("trainer", "shard", "shard's node", "trainers' node")


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """One death.

    Attributes:
        step_s, answer_s: longest time without a step, and without an answer of the memory.
        quiet_step_s, quiet_answer_s: likewise, before it.
        steps_again: optimizer steps that are made a second time.
    """

    death: str
    replicas: int
    step_s: float
    answer_s: float
    quiet_step_s: float
    quiet_answer_s: float
    steps_again: int


@contextmanager
def nodes(args: argparse.Namespace) -> Iterator[Any]:
    """A head without CPUs, one node for trainers and two for shards."""
    system = {"worker_niceness": 0}
    if args.health_check_s:
        milliseconds = int(1000 * args.health_check_s)
        system |= {
            "health_check_initial_delay_ms": milliseconds,
            "health_check_period_ms": milliseconds // 2,
            "health_check_timeout_ms": milliseconds,
            "health_check_failure_threshold": 2,
        }
    head = {
        "num_cpus": 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_system_config": system,
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        add_node(made, "trainer_node")
        add_node(made, "memory_node")
        add_node(made, "memory_node")
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(made: Any, resource: str) -> None:
    made.add_node(num_cpus=2, object_store_memory=STORE_BYTES, resources={resource: 2})


def processes_of(actor: str) -> list[psutil.Process]:
    """Of the actors of a class, by its name; the oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if "".join(process.info["cmdline"] or []).startswith(f"ray::{actor}"):
            found.append(process)
    return sorted(found, key=lambda process: float(process.info["create_time"]))


def node_of(made: Any, actor: str) -> Any:
    """A node that runs an actor of this class."""
    parents = {process.ppid() for process in processes_of(actor)}
    for node in made.worker_nodes:
        if node.all_processes["raylet"][0].process.pid in parents:
            return node
    raise RuntimeError(f"no node runs a {actor}")


def killer(made: Any, death: str) -> Callable[[], None]:
    """What is to die dies when this is called; a node that replaces it is there by now."""
    processes = {"trainer": "TrainerHost", "shard": "ShardHost"}
    if death in processes:
        victim = processes_of(processes[death])[-1].pid
        return lambda: os.kill(victim, signal.SIGKILL)
    actor, resource = {
        "shard's node": ("ShardHost", "memory_node"),
        "trainers' node": ("TrainerHost", "trainer_node"),
    }[death]
    add_node(made, resource)
    made.wait_for_nodes()
    node = node_of(made, actor)
    return lambda: made.remove_node(node, allow_graceful=False)


def settings_of(run_dir: Path, corpus: Path, replicas: int, args: argparse.Namespace) -> list[str]:
    return [
        f"run.dir={run_dir}",
        f"data.corpus={corpus}",
        "memory.refresh_every_steps=1000000",
        "memory.shards=2",
        f"memory.replicas={replicas}",
        "memory.node_resource=memory_node",
        "runtime.node_resource=trainer_node",
        "runtime.trainers=2",
        "optim.steps=1000000",
        f"optim.batch_size={args.batch}",
        f"checkpoint.every_steps={args.checkpoint_every}",
        "evaluate.every_steps=0",
        "logging.log_every_steps=1",
        "logging.progress=false",
        *args.set,
    ]


@contextmanager
def training(made: Any, home: Path, settings: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`pluglm pretrain`, ended at the end."""
    with (home / "log").open("wb") as log:
        command = [*PLUGLM, "pretrain", preset("quickstart"), *settings]
        process = subprocess.Popen(
            [*map(str, command), f"cluster.address={made.address}"],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: str, happened: Callable[[], bool], home: Path, within_s: float) -> None:
    """Raises RuntimeError with the log's end: it did not happen."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            log = (home / "log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{what}: not in {within_s:.0f} s; the log ends:\n{log[-3000:]}")
        time.sleep(0.05)


def one_death(
    corpus: Path, home: Path, death: str, replicas: int, args: argparse.Namespace
) -> Recovered:
    """Start everything, kill one thing, and watch."""
    home.mkdir()
    run_dir = home / "run"
    with nodes(args) as made, training(made, home, settings_of(run_dir, corpus, replicas, args)):
        steps = Steps(run_dir / "metrics.jsonl")
        enough = args.checkpoint_every + 3
        with steps:
            wait_for("the first steps", lambda: steps.count > enough, home, START_S)
            (server,) = RayMemory.list_servers()
            with Answers(RayMemory.attach(server.name, deadline_s=RECOVER_S)) as answers:
                wait_for("the first answers", lambda: answers.count > 3, home, START_S)
                kill = killer(made, death)
                quiet_from = time.monotonic()
                time.sleep(AFTER_S)
                killed = time.monotonic()
                reached = steps.step
                kill()
                wait_for(
                    "steps and answers after it",
                    lambda: (
                        steps.moves(since=killed, pause_s=AFTER_S)
                        and answers.moves(since=killed, pause_s=AFTER_S)
                    ),
                    home,
                    RECOVER_S,
                )
                return Recovered(
                    death=death,
                    replicas=replicas,
                    step_s=steps.longest_pause(killed, time.monotonic()),
                    answer_s=answers.longest_pause(killed, time.monotonic()),
                    quiet_step_s=steps.longest_pause(quiet_from, killed),
                    quiet_answer_s=answers.longest_pause(quiet_from, killed),
                    steps_again=steps.again(reached, since=killed),
                )


def _row(runs: list[Recovered]) -> list[str]:
    def shown(name: str) -> str:
        return Spread.of([float(getattr(run, name)) for run in runs]).shown(2)

    first = runs[0]
    return [
        f"{first.death}, {first.replicas} replica{'s' if first.replicas > 1 else ''}",
        *map(shown, ("step_s", "quiet_step_s", "answer_s", "quiet_answer_s")),
        Spread.of([float(run.steps_again) for run in runs]).shown(0),
    ]


_HEADERS = [
    "what died",
    "no step for, s",
    "before, s",
    "no answer for, s",
    "before, s",
    "steps made again",
]


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--deaths", nargs="+", choices=DEATHS, default=list(DEATHS))
    parser.add_argument("--replicas", nargs="+", type=positive, default=[1, 2])
    parser.add_argument(
        "--documents", type=positive, default=2000, help="of the invented corpus (default: 2000)"
    )
    parser.add_argument("--batch", type=positive, default=8, help="sequences (default: 8)")
    parser.add_argument("--checkpoint-every", type=positive, default=20, help="steps (default: 20)")
    parser.add_argument("--repeats", type=positive, default=3, help="of each death (default: 3)")
    parser.add_argument(
        "--health-check-s",
        type=float,
        default=1.0,
        help="how often Ray looks for its nodes; 0: Ray's own setting (default: 1)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of the runs"
    )
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    facts = begin()
    rows: list[list[Recovered]] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        text = home / "documents.jsonl"
        write_documents(text, args.documents)
        info = build_corpus(
            [text],
            home / "corpus",
            tokenizer="train:8192",
            sequence_length=ENTRY_TOKENS + 1,
            entry_tokens=ENTRY_TOKENS,
        )
        print(
            f"{info.entries:,} entries of {info.entry_tokens} tokens in 2 shards, 2 trainers; a "
            f"checkpoint every {args.checkpoint_every} steps; {args.repeats} death(s) each: median "
            "(lowest to highest)\n",
            flush=True,
        )
        for death in args.deaths:
            # A trainer's death does not hang on the memory's replicas.
            for replicas in args.replicas if "shard" in death else args.replicas[:1]:
                runs = []
                for turn in range(args.repeats):
                    place = home / f"{death.replace(' ', '-')}-{replicas}-{turn}"
                    runs.append(one_death(info.path, place, death, replicas, args))
                    note(str(runs[-1]))
                rows.append(runs)
    print(table(_HEADERS, [_row(runs) for runs in rows]))
    finish(args.json, facts, args, [run for runs in rows for run in runs])


if __name__ == "__main__":
    main()
