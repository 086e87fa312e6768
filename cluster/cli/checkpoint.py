"""`pluglm checkpoint list|verify`: what a run can be resumed from."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cluster.cli.command import Command
from cluster.cli.text import size


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run, finished or not")
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _list(options: argparse.Namespace) -> int:
    from cluster.checkpoints import list_checkpoints

    listed = list_checkpoints(options.run)
    if options.json:
        rows = [
            {
                "name": one.path.name,
                "bytes": one.size,
                "problem": one.problem,
                "state": None if one.state is None else asdict(one.state),
            }
            for one in listed
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for one in listed:
        if one.state is None:
            print(f"{one.path.name}  not to be resumed from: {one.problem}")
            continue
        state = one.state
        print(
            f"{one.path.name}  {size(one.size)}, {state.trainers} trainers, "
            f"ZeRO-{state.zero_stage}, memory {state.content_version} with keys of step "
            f"{state.encoder_step}"
        )
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="such as step-00000100 (default: the newest)"
    )


def _verify(options: argparse.Namespace) -> int:
    from cluster.checkpoints import find_checkpoint, problems
    from cluster.cli.places import run_config

    config = run_config(options.run)
    checkpoint = find_checkpoint(options.run, options.checkpoint)
    found = problems(options.run, checkpoint, config)
    if options.json:
        print(json.dumps({"name": checkpoint.name, "problems": found}, indent=1))
    elif found:
        print("\n".join(f"{checkpoint.name}: {problem}" for problem in found))
    else:
        print(f"{checkpoint.name}: whole; its settings, corpus and memory are there")
    return 1 if found else 0


LIST = Command(
    name="checkpoint list",
    summary="what a run can be resumed from",
    description="""\
List a run's committed checkpoints, oldest first: size, how many trainers wrote it, and the memory
that was live. Any number of trainers, any ZeRO stage and any number of shards can go on from
one.""",
    example="pluglm checkpoint list runs/wiki",
    configure=_add_run,
    run=_list,
)
VERIFY = Command(
    name="checkpoint verify",
    summary="check a checkpoint, and that all it needs is there",
    description="""\
Read every file of a checkpoint and compare it with its size and checksum; check that the run's
settings and corpus are those that it was written with, and that the memory's store has its content
version. Exit code 1 when something is wrong, one line for each. `pluglm pretrain --resume` checks
the same, and passes a damaged checkpoint over for the one before, saying so.""",
    example="pluglm checkpoint verify runs/wiki --checkpoint step-00000100",
    configure=_verify_arguments,
    run=_verify,
)
