"""`pluglm probe|update`: what a model knows by cloze probes, and what an edit makes of it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import STORE_HELP, add_json, identity, place, some_path

if TYPE_CHECKING:
    from cluster.editing.passages import Knowledge
    from cluster.probes.reading import Fitted
    from cluster.trained_model import TrainedModel
    from memory_server.store.store import Store

_PROBES = """\
PROBES is a file in LAMA's format (.jsonl, .csv, .tsv or .parquet): the columns sub and
obj, and a `template` with [X] and [Y] or a `masked_sentence` with [MASK]; relation, if
there is one, groups the figures."""


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=place, metavar="STORE|RUN_DIR", help=STORE_HELP)
    parser.add_argument("probes", type=some_path, metavar="PROBES", help="a file of facts")
    parser.add_argument(
        "--model", type=some_path, metavar="DIR", help="the model (default: the run's own)"
    )
    parser.add_argument(
        "-k",
        type=positive,
        metavar="K",
        help="entries that each layer reads (default: the model's own)",
    )
    parser.add_argument(
        "--prompt",
        choices=("template", "sentence"),
        help="ask with this (default: the template where there is one)",
    )
    parser.add_argument(
        "--known", metavar="COLUMN", help="column that says whether the memory can know the fact"
    )
    parser.add_argument(
        "--skip-unfit",
        action="store_true",
        help="leave out probes whose object is not one token, or that are too long",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: a GPU if there is one)",
    )
    add_json(parser)


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--patterns",
        type=some_path,
        metavar="FILE",
        help="also ask each fact in all these ways (columns relation and template): consistency",
    )


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--snippets", metavar="COLUMN", help="add the probes' own texts, a column of theirs"
    )
    parser.add_argument(
        "--add", type=some_path, nargs="+", default=[], metavar="FILE", help="add these files"
    )
    parser.add_argument(
        "--domain", default="default", metavar="NAME", help="where --add goes (default: default)"
    )
    parser.add_argument(
        "--replace",
        type=some_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows with an id or a doc_id, and the new text",
    )
    parser.add_argument(
        "--remove", type=identity, nargs="+", default=[], metavar="ID", help="remove entries"
    )
    parser.add_argument(
        "--remove-doc", type=identity, nargs="+", default=[], metavar="DOC_ID", help="documents"
    )
    parser.add_argument(
        "--new-answer", metavar="COLUMN", help="column of the object that the edit gives a fact"
    )
    parser.add_argument(
        "--locality",
        type=some_path,
        metavar="FILE",
        help="probes that the edit is not about, whose answers should stay",
    )
    parser.add_argument("--keep", action="store_true", help="keep the edit when all is measured")


def _opened(options: argparse.Namespace) -> tuple[TrainedModel, Store]:
    from cluster.cli.memory_options import opened_store
    from cluster.cli.places import is_run, run_model
    from cluster.memory_tools import chosen_device
    from cluster.trained_model import load_trained_model

    model = options.model
    if model is None:
        if "://" in options.store or not is_run(Path(options.store)):
            raise UsageError(f"{options.store} is no run directory, so --model is needed")
        model = run_model(Path(options.store))
    store = opened_store(options.store)
    trained = load_trained_model(model, device=chosen_device(options.device))
    trained.check_fits(store)
    return trained, store


def _fitted(options: argparse.Namespace, trained: TrainedModel, path: Path, main: bool) -> Fitted:
    from cluster.probes.reading import Columns, fit, read_probes
    from cluster.probes.shown import describe_fit

    columns = Columns()
    if main:
        columns = Columns(
            known=options.known,
            snippet=getattr(options, "snippets", None),
            new_answer=getattr(options, "new_answer", None),
        )
    probes = read_probes(path, prompt=options.prompt if main else None, columns=columns)
    fitted = fit(trained, probes, skip_unfit=options.skip_unfit)
    _say(f"{path}: {describe_fit(fitted)}")
    return fitted


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _probe(options: argparse.Namespace) -> int:
    from cluster.probes.consistency import consistency, read_patterns
    from cluster.probes.scoring import ask, by_group
    from cluster.probes.shown import describe_consistency, describe_figures, groups_as_json

    patterns = None if options.patterns is None else read_patterns(options.patterns)
    trained, store = _opened(options)
    fitted = _fitted(options, trained, options.probes, True)
    k = trained.model.config.top_k if options.k is None else options.k
    _say(f"computing the keys of {store.manifest().entries:,} entries ...")
    with trained.memory(store.location) as memory:
        conditions = {"with": memory, "without": None}
        found = {
            name: by_group(fitted, ask(trained, one, fitted, k=k))
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


def _update(options: argparse.Namespace) -> int:
    from cluster.probes.shown import describe_update, groups_as_json
    from cluster.probes.updating import Edits, update_knowledge

    trained, store = _opened(options)
    fitted = _fitted(options, trained, options.probes, True)
    locality = None
    if options.locality is not None:
        locality = _fitted(options, trained, options.locality, False)
    edits = Edits(
        remove_ids=tuple(options.remove),
        remove_doc_ids=tuple(options.remove_doc),
        replace=_knowledge(options.replace),
        add=_knowledge(options.add),
        domain=options.domain,
        snippets=options.snippets is not None,
    )
    done = update_knowledge(
        trained,
        store,
        fitted,
        edits,
        k=trained.model.config.top_k if options.k is None else options.k,
        locality=locality,
        keep=options.keep,
        say=_say,
    )
    if options.json:
        told = asdict(done)
        told["stages"] = {name: groups_as_json(groups) for name, groups in done.stages.items()}
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(describe_update(done))
    return 0


def _knowledge(files: list[Path]) -> Knowledge | None:
    from cluster.editing.passages import Knowledge

    return Knowledge(files=tuple(files)) if files else None


PROBE = Command(
    name="probe",
    summary="what a model knows, by cloze probes, with the memory and without",
    description=f"""\
Ask a model for the objects of facts, with its memory and without: precision at 1 and
10, mean reciprocal rank and probability, by relation.

{_PROBES}""",
    example="""\
pluglm probe runs/first facts.jsonl
pluglm probe runs/first trex.parquet --known obj_in_article --patterns patterns.parquet --json""",
    configure=_probe_arguments,
    run=_probe,
)

UPDATE = Command(
    name="update",
    summary="edit knowledge without training, and measure what changed",
    description=f"""\
Ask, edit the memory, ask again, roll back, ask again: what an edit changes, what it
leaves alone, and that it can be undone. No weight changes. The memory is left as it
was unless --keep is given.

{_PROBES}""",
    example="""\
pluglm update runs/first google-re.parquet --snippets snippet --skip-unfit
pluglm update runs/first facts.jsonl --replace corrected.jsonl --locality others.jsonl
pluglm update runs/first facts.jsonl --remove 17 18 --keep""",
    configure=_update_arguments,
    run=_update,
    after_interrupt="the memory is rolled back to what it was",
)
