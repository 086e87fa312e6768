"""`pluglm explain`: which entries a prediction used, and what it would be without each of them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import (
    STORE_HELP,
    add_json,
    add_server,
    identity,
    place,
    some_path,
    unicode_text,
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", type=place, metavar="STORE|RUN_DIR", help=STORE_HELP)
    parser.add_argument(
        "sentence", type=unicode_text, help="the text, with [MASK] where the model is to answer"
    )
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
        "--answer",
        type=unicode_text,
        metavar="WORD",
        help="follow this word's probability (default: the model's first guess)",
    )
    parser.add_argument(
        "--exclude-document",
        type=identity,
        metavar="DOC_ID",
        help="leave out this document's entries",
    )
    parser.add_argument(
        "--guesses",
        type=positive,
        default=5,
        metavar="N",
        help="words to tell for each [MASK] (default: %(default)s)",
    )
    parser.add_argument(
        "--html",
        type=some_path,
        metavar="FILE",
        help="also write a page to look at: it loads nothing and can be sent to anyone",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: a GPU if there is one)",
    )
    add_server(
        parser, does="ask this running memory server, with its keys; STORE may then be left out"
    )
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.places import is_run, memory_path, run_model
    from cluster.explain.opened import explained_by_server, explained_by_store
    from cluster.explain.page import write_page
    from cluster.explain.terminal import describe

    if options.store is None and options.server is None:
        raise UsageError("give a STORE or RUN_DIR before the sentence, or --server NAME")
    model = options.model
    if model is None:
        if options.store is None or not is_run(Path(options.store)):
            raise UsageError(
                f"{options.store or 'a server'} is no run directory, so --model is needed; see "
                "`pluglm explain --help`"
            )
        model = run_model(Path(options.store))
    if options.html is not None and not options.html.parent.is_dir():
        raise UsageError(f"--html {options.html}: there is no directory {options.html.parent}")
    if options.html is not None and options.html.is_dir():
        raise UsageError(f"--html {options.html}: is a directory; name a file in it")
    asked = {
        "k": options.k,
        "answer": options.answer,
        "exclude": options.exclude_document,
        "guesses": options.guesses,
        "device": options.device,
    }
    if options.server is not None:
        told = explained_by_server(
            options.server, options.address, model, options.sentence, **asked
        )
    else:
        store = options.store
        told = explained_by_store(
            store if "://" in store else memory_path(Path(store)),
            model,
            options.sentence,
            say=lambda line: print(line, file=sys.stderr),
            **asked,
        )
    if options.html is not None:
        write_page(told, options.html)
        print(f"written: {options.html}", file=sys.stderr)
    if options.json:
        print(json.dumps(told.as_json(), indent=1, ensure_ascii=False))
    else:
        print(describe(told, width=shutil.get_terminal_size((140, 24)).columns))
    return 0


EXPLAIN = Command(
    name="explain",
    summary="which entries a prediction used, and what it would be without them",
    description="""\
Tell what a model says at the [MASK]s of a text, which entries each memory layer read
for it, how much attention every token and head gave them, and what the model would
say if the memory did not hold an entry: measured, by leaving it out.""",
    example="""\
pluglm explain runs/quickstart/run-seed0 "The capital of Portugal is [MASK]."
pluglm explain runs/first "Lisbon is the [MASK] of Portugal." --answer capital --html why.html
pluglm explain "a river in [MASK]" --server wiki --model runs/first/model --json""",
    configure=_arguments,
    run=_run,
)
