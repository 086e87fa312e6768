"""`pluglm pretrain`: the main job."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="the configuration, as those in configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one, argparse says that it is required when CONFIG.toml is missing
        metavar="key=value",
        help="settings that count more than the file's, such as memory.top_k=8",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in run.dir: same data order, same memory",
    )
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="the same if there is a checkpoint, else begin: for jobs that are queued again",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the configuration, print all of it as TOML, and do nothing else",
    )


def _run(options: argparse.Namespace) -> int:
    from cluster.config import load_config

    config = load_config(options.config, options.overrides)
    if options.check:
        print(config.to_toml(), end="")
        return 0
    from cluster.pretrain import pretrain

    return pretrain(config, resume=options.resume, auto_resume=options.auto_resume)


PRETRAIN = Command(
    name="pretrain",
    summary="train a PlugLM on a corpus while its memory is refreshed",
    description="""\
Train a PlugLM on a corpus. Ray holds the memory in shards and runs the trainers,
each a DeepSpeed engine; the memory's keys are refreshed while training goes on.
Everything is written to run.dir: checkpoints, metrics, the model, report.html.

Ctrl-C once writes a checkpoint and ends; --resume goes on from it. SIGTERM and
SIGUSR1 (Slurm, Kubernetes) do the same and exit with code 75, which asks that the
job be queued again. A trainer or node that dies costs the steps since the last
checkpoint: trainers are started again by themselves.""",
    example="""\
pluglm pretrain configs/pluglm-base.toml data.corpus=data/articles run.dir=runs/first
pluglm pretrain configs/pluglm-base.toml data.corpus=data/articles run.dir=runs/first --resume""",
    configure=_arguments,
    run=_run,
    after_interrupt="committed checkpoints are kept: --resume goes on from the newest",
)
