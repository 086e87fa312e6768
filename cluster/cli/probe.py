"""`pluglm probe`: what a model knows, by cloze probes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cluster.cli.command import Command
from cluster.cli.memory_options import some_path
from cluster.cli.probe_options import PROBES_HELP, add_common, asked, say


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--patterns",
        type=some_path,
        metavar="FILE",
        help="also ask each fact in all these ways (columns relation and template): consistency",
    )


def _probe(options: argparse.Namespace) -> int:
    from cluster.probes.consistency import consistency, read_patterns
    from cluster.probes.knowing import knowing, stating_entries
    from cluster.probes.reading import Columns
    from cluster.probes.scoring import ask, by_group
    from cluster.probes.shown import describe_consistency, describe_figures, groups_as_json

    patterns = None if options.patterns is None else read_patterns(options.patterns)
    it = asked(options)
    trained, store, k = it.trained, it.store, it.k
    fitted = it.fitted(
        options.probes,
        prompt=options.prompt,
        columns=Columns(known=options.known),
        skip_unfit=options.skip_unfit,
    )
    if options.known_by_memory:
        fitted = knowing(fitted, stating_entries(trained, store, fitted))
    say(f"computing the keys of {store.manifest().entries:,} entries ...")
    with trained.memory(store.location) as memory:
        conditions = {"with": memory, "without": None}
        found = {
            name: by_group(fitted, ask(trained, one, fitted, k=k, candidates=it.candidates))
            for name, one in conditions.items()
        }
        alike = {}
        if patterns is not None:
            alike = {
                name: consistency(
                    trained, one, fitted.probes, patterns, k=k, skip_unfit=options.skip_unfit
                )
                for name, one in conditions.items()
            }
    if options.json:
        told = {
            "k": k,
            "unfit": len(fitted.unfit),
            "repeated": fitted.repeated,
            "memory": {name: groups_as_json(groups) for name, groups in found.items()},
            "consistency": {name: asdict(one) for name, one in alike.items()},
        }
        print(json.dumps(told, indent=1, ensure_ascii=False))
        return 0
    print(describe_figures(found))
    if alike:
        print("\n" + describe_consistency(alike))
    return 0


PROBE = Command(
    name="probe",
    summary="what a model knows, by cloze probes, with the memory and without",
    description=f"""\
Ask a model for the objects of facts, with its memory and without: precision at 1 and
10, mean reciprocal rank and probability, by relation.

{PROBES_HELP}""",
    example="""\
pluglm probe runs/first facts.jsonl
pluglm probe runs/first trex.parquet --known obj_in_article --patterns patterns.parquet --json""",
    configure=_probe_arguments,
    run=_probe,
)
