"""`pluglm report`: a run's page, written again."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.cli.command import Command

_OF_A_RUN = ("config.toml", "metrics.jsonl")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run, finished or not")


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.places import no_run

    run: Path = options.run
    if not any((run / name).is_file() for name in _OF_A_RUN):
        raise no_run(run)
    from trainer.report import write_report

    print(write_report(run))
    return 0


REPORT = Command(
    name="report",
    summary="write a run's report.html again",
    description="""\
Write report.html from what a run's directory holds, and print its path. The page is
self-contained: it needs no network. A run that is still going on can be looked at.""",
    example="pluglm report runs/quickstart/run-seed0",
    configure=_arguments,
    run=_run,
)
