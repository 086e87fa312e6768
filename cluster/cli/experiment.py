"""`pluglm experiment`: an experiment's stages, run once each, and what they show over seeds."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import some_path


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name.strip(), value


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=some_path, metavar="TOML", help="what is to be run")
    parser.add_argument(
        "--data", type=some_path, metavar="DIR", required=True, help="where its data lie"
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="where everything is written (default: runs/experiments/NAME)",
    )
    parser.add_argument(
        "--set",
        type=_variable,
        action="append",
        default=[],
        metavar="name=value",
        help="another value for one of its variables",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="run stages again whose settings have changed, and all that follow",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="run so many seeds at a time, each with its share of the machine's threads "
        "(default: 1)",
    )
    parser.add_argument(
        "--write-docs",
        type=some_path,
        metavar="FILE",
        help="put the tables between this document's markers",
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.registry import find_command
    from cluster.experiments.plan import read_experiment
    from cluster.experiments.results import (
        check_section,
        described,
        results_of,
        write_section,
    )
    from cluster.experiments.running import Place, StageFailed, run_experiment
    from trainer.export import write_json

    if not options.data.is_dir():
        raise UsageError(f"--data {options.data}: there is no such directory")
    experiment = read_experiment(options.experiment, dict(options.set))
    # What can be seen now is refused now, not when hours of earlier stages are done.
    for stage in experiment.stages:
        if stage.run:
            find_command(stage.run)
    if options.write_docs is not None:
        check_section(options.write_docs, experiment.name)
    out = options.out or Path("runs") / "experiments" / experiment.name
    place = Place(
        experiment=experiment,
        here=options.experiment.resolve().parent,
        data=options.data.resolve(),
        out=out.resolve(),
    )
    try:
        run_experiment(place, again=options.again, say=_say, jobs=options.jobs)
    except StageFailed as error:
        print(f"pluglm: error: {error}", file=sys.stderr)
        return 1
    results = results_of(place)
    write_json(
        out / "results.json",
        {
            "experiment": experiment.name,
            "description": experiment.description,
            "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "variables": dict(experiment.variables),
            **results.as_json(),
        },
    )
    text = described(results)
    print(text)
    if options.write_docs is not None:
        write_section(options.write_docs, experiment.name, text)
    _say(f"written: {out / 'results.json'}")
    return 0


EXPERIMENT = Command(
    name="experiment",
    summary="run an experiment's stages, and compare over seeds",
    description="""\
Run the stages of an experiment's TOML file, each a pluglm command, for every seed.
A finished stage is not run again, so that a run that was interrupted goes on. In the
end: each measure's mean and deviation, paired tests over the seeds, results.json.""",
    example="""\
pluglm experiment experiments/google-re.toml --data DATA
pluglm experiment experiments/google-re.toml --data DATA --set steps=4000 --out runs/longer
pluglm experiment experiments/domains.toml --data DATA --jobs 3""",
    configure=_arguments,
    run=_run,
    after_interrupt="finished stages are kept: the same command goes on",
)
