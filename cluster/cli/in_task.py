"""`pluglm in-task`: a task's training samples as knowledge, compared with and without."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from cluster.cli.adapt import add_comparison_options
from cluster.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="a TOML file, as configs/in-task.toml"
    )
    add_comparison_options(parser)


def _run(options: argparse.Namespace) -> int:
    from cluster.adaptation.comparing import RESULTS
    from cluster.adaptation.in_task_run import check_in_task, load_in_task_config, run_in_task
    from cluster.adaptation.outcome import outcome_text

    config = load_in_task_config(options.config, options.set)
    if options.out is not None:
        config = replace(config, run=replace(config.run, dir=str(options.out)))
    samples = check_in_task(config, say=print if options.check else _say)
    if options.check:
        for row in samples.rows[:3]:
            print(f"an entry: {row['text']}")
        print("everything fits")
        return 0
    found, references = run_in_task(config, samples, resume=options.resume, say=_say)
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print(outcome_text(found, references))
        print(f"\n{Path(config.run.dir) / RESULTS}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


IN_TASK = Command(
    name="in-task",
    summary="put a task's training samples into the memory, and compare",
    description="""\
Turn a task's training samples into entries, each with its label through a prompt
template, in a copy of the memory; fine-tune with and without them over the same seeds,
and compare. While it is trained on, no row finds an entry of its own text; rows of dev
and test never become entries. How many of them repeat a training row is told, and
scores are given with and without those.""",
    example="""\
pluglm in-task configs/in-task.toml --check
pluglm in-task in-task.toml --set train.seeds=[0,1,2,3,4] --out runs/acl-arc-in-task
pluglm in-task in-task.toml --out runs/acl-arc-in-task --resume""",
    configure=_arguments,
    run=_run,
    after_interrupt="finished conditions and seeds are kept: --resume trains the others",
)
