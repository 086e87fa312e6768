"""`pluglm quickstart`: the whole way in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.cli.command import Command

_DIRECTORY, _SYNTHETIC_DIRECTORY = Path("runs/quickstart"), Path("runs/synthetic")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="train on facts drawn afresh, which only the memory can tell",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help=f"where everything is written (default: {_DIRECTORY}, or {_SYNTHETIC_DIRECTORY} with "
        "--synthetic)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights, data order and masks (default: 0)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting of the run, such as optim.steps=200; may be given again",
    )


def _run(options: argparse.Namespace) -> int:
    directory = options.dir
    if directory is None:
        directory = _SYNTHETIC_DIRECTORY if options.synthetic else _DIRECTORY
    from cluster.quickstart import quickstart

    return quickstart(
        directory=directory,
        synthetic=options.synthetic,
        seed=options.seed,
        overrides=options.set,
    )


QUICKSTART = Command(
    name="quickstart",
    summary="the whole way in one command, on text that comes along",
    description="""\
Build a corpus from the English Wikipedia summaries that the extra "quickstart"
installs, train a small PlugLM on it with Ray and DeepSpeed, and say what its memory
is worth. At most ten minutes on two cores.""",
    example="""\
pluglm quickstart
pluglm quickstart --synthetic
pluglm quickstart --dir runs/short --set optim.steps=200""",
    configure=_arguments,
    run=_run,
    after_interrupt="what was committed is kept: the same command goes on where it can",
)
