"""`pluglm adapt`: a domain plugged in, in one command, and what it is worth, in another."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError
from cluster.cli.memory_edit import add_knowledge, given_knowledge
from cluster.cli.memory_options import (
    add_edit_options,
    editor,
    report_edit,
    some_path,
    unicode_text,
)
from cluster.cli.memory_options import place as some_place

if TYPE_CHECKING:
    from cluster.adaptation.domain import Adapted
    from cluster.trained_model import TrainedModel


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store",
        type=some_place,
        metavar="MEMORY",
        help="a memory's store (a directory or a URL), or a corpus or run directory, whose memory "
        "is taken",
    )
    add_knowledge(parser)
    parser.add_argument(
        "--name", required=True, type=unicode_text, metavar="DOMAIN", help="the domain's name"
    )
    parser.add_argument(
        "--model",
        type=some_path,
        metavar="DIR",
        help="the model that is to read the domain: whether it can is looked at first (default: "
        "the run's, where MEMORY is a run that has one)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="put the text in the place of the domain's content"
    )
    parser.add_argument(
        "--undo",
        "--remove",
        dest="undo",
        action="store_true",
        help="go back: take the domain out",
    )
    add_edit_options(parser)


def _run(options: argparse.Namespace) -> int:
    if options.undo:
        return _undo(options)
    from cluster.adaptation.domain import plug_in_domain

    if not options.files and options.text is None:
        raise UsageError("give the domain's text: files, or --text; see `pluglm adapt --help`")
    knowledge = given_knowledge(options)
    with editor(options) as edit:
        done = plug_in_domain(
            edit,
            knowledge,
            options.name,
            model=_model(options),
            replacing=options.replace,
            say=_say,
        )
    if options.json:
        print(json.dumps(_as_dict(done, options), indent=1, ensure_ascii=False))
        return 0
    report_edit(done.edit, options)
    print("\n".join(_told(done, options)))
    return 0


def _undo(options: argparse.Namespace) -> int:
    if options.files or options.text is not None or options.replace:
        raise UsageError("--undo takes a domain out; leave text and --replace away")
    with editor(options, check=False) as edit:
        done = edit.unplug(options.name)
    report_edit(done, options)
    if not options.json and done.version is not None:
        print(f"back again: pluglm memory plug {quote(options.store)} {quote(options.name)}")
    return 0


def _model(options: argparse.Namespace) -> TrainedModel | None:
    """The model that is named, or that of the run; None where there is none to look at."""
    from cluster.cli.places import MODEL, is_run
    from cluster.trained_model import load_trained_model

    path = options.model
    if path is None and "://" not in options.store:
        run = Path(options.store)
        path = run / MODEL if is_run(run) and (run / MODEL).is_dir() else None
    return None if path is None else load_trained_model(path)


def _told(done: Adapted, options: argparse.Namespace) -> list[str]:
    read = done.edit.read
    assert read is not None, "a domain's text is read"
    seen = (
        "whether a model can encode them was not looked at (--model DIR)"
        if done.encoded is None
        else f"{done.encoded:,} encoded by the model"
    )
    lines = [
        f"{read.passages - read.empty:,} passages, {read.entries:,} entries, {done.tokens:,} "
        f"tokens in {done.seconds:.1f} s; {seen}"
    ]
    if done.edit.version is None:
        return lines
    place = quote(options.store)
    server = "" if options.server is None else f" --server {quote(options.server)}"
    back = f"pluglm adapt {place} --name {quote(options.name)} --undo"
    if options.replace and done.edit.counts.removed:
        # To undo would take the domain out, and not bring back what it held.
        back = f"pluglm memory rollback {place} {done.edit.parent}"
    lines.append(f"to go back: {back}{server}")
    return lines


def _as_dict(done: Adapted, options: argparse.Namespace) -> dict[str, object]:
    from cluster.cli.memory_options import edit_as_dict

    return {
        **edit_as_dict(done.edit, options.server),
        "domain": options.name,
        "tokens": done.tokens,
        "encoded": done.encoded,
        "seconds": round(done.seconds, 3),
    }


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """What `adapt compare` and `in-task` take beside their configuration."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting that counts more than the file's, such as train.seeds=[0,1,2,3,4]; may be "
        "given again",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where everything is written, instead of run.dir"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on in a directory: what is finished of each condition and seed is kept",
    )
    parser.add_argument(
        "--check", action="store_true", help="check every condition, and train nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="a TOML file, as configs/adaptation.toml"
    )
    add_comparison_options(parser)


def _compare(options: argparse.Namespace) -> int:
    from cluster.adaptation.comparing import RESULTS, check_comparison, run_comparison
    from cluster.adaptation.outcome import outcome_text
    from cluster.adaptation.presets import adaptation_comparison, load_adaptation_config

    config = load_adaptation_config(options.config, options.set)
    if options.out is not None:
        config = replace(config, run=replace(config.run, dir=str(options.out)))
    comparison = adaptation_comparison(config)
    check_comparison(comparison, say=print if options.check else _say)
    if options.check:
        print("everything fits")
        return 0
    found = run_comparison(comparison, resume=options.resume, say=_say)
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print(outcome_text(found, comparison.references))
        print(f"\n{comparison.home / RESULTS}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


ADAPT = Command(
    name="adapt",
    summary="text of a domain to a plugged-in domain, and back",
    description="""\
Adapt a model to a domain without training it: cut the domain's text into entries with
the memory's own tokenizer, see that the model can encode them, and plug them in as a
domain, in one commit. --undo takes the domain out again.

FILES are what `pluglm corpus build` reads: text (.txt, blank lines part documents),
JSON Lines, JSON, CSV, Parquet, Arrow, some as .gz, or directories of them.

`pluglm adapt compare CONFIG` measures what the domain is worth on a task.""",
    example="""\
pluglm adapt runs/first --name biomed papers.parquet abstracts.jsonl
pluglm adapt data/articles --name biomed papers.parquet --model runs/first/model --dry-run
pluglm adapt data/articles --name biomed corrected.parquet --replace --server wiki
pluglm adapt runs/first --name biomed --undo""",
    configure=_arguments,
    run=_run,
    after_interrupt="a domain is plugged in whole or not at all",
)

COMPARE = Command(
    name="adapt compare",
    summary="fine-tune without, with and beside a domain's memory, and compare",
    description="""\
Fine-tune one task under several conditions over the same seeds: the model without a
memory, with the general memory, with the domain's as well (the paper's adaptation),
with the domain's alone, plain BERT of the same size, and plain BERT that was
pre-trained further on the domain's text. Means, deviations and paired tests go to
comparison.json and are printed, with and without rows whose text is in the training
file too.""",
    example="""\
pluglm adapt compare configs/adaptation.toml --check
pluglm adapt compare adaptation.toml --out runs/chemprot
pluglm adapt compare adaptation.toml --out runs/chemprot --resume""",
    configure=_compare_arguments,
    run=_compare,
    after_interrupt="finished conditions and seeds are kept: --resume trains the others",
)
