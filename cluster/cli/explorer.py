"""`pluglm explorer`: ask a model, edit its memory, and see the answers change."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import STORE_HELP, place, some_path, whole_number


def _port(text: str) -> int:
    number = whole_number(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: they are from 0 to 65535")
    return number


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=place, metavar="STORE|RUN_DIR", help=STORE_HELP)
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
        "--port", type=_port, default=0, help="of this machine's loopback (default: a free one)"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="edit the store itself; otherwise a copy that is gone at the end",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: a GPU if there is one)",
    )


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.memory_options import opened_store
    from cluster.cli.places import is_run, run_model
    from cluster.explain.server import ExplorerServer
    from cluster.explain.session import Session, private_copy
    from cluster.memory_tools import chosen_device
    from cluster.trained_model import load_trained_model
    from memory_server.requests import MAX_TOP_K

    if options.k is not None and options.k >= MAX_TOP_K:
        raise UsageError(f"-k {options.k}: at most {MAX_TOP_K - 1} entries can be explained")
    model = options.model
    if model is None:
        if "://" in options.store or not is_run(Path(options.store)):
            raise UsageError(f"{options.store} is no run directory, so --model is needed")
        model = run_model(Path(options.store))
    store = opened_store(options.store)
    trained = load_trained_model(model, device=chosen_device(options.device))
    trained.check_fits(store)
    k = trained.model.config.top_k if options.k is None else options.k
    with tempfile.TemporaryDirectory(prefix="pluglm-explorer-") as folder:
        note = f"Edits are commits in {store.location}: `pluglm memory log` tells them."
        if not options.write:
            note = f"Edits are made in a copy of {store.location} that is gone at the end."
            store = private_copy(store, Path(folder) / "store")
        with Session(trained, store, k=k, say=_say) as session:
            server = ExplorerServer(session, port=options.port, note=note)
            print(server.url, flush=True)
            _say(f"open this address in a browser; {note} Ctrl-C ends it.")
            try:
                server.serve_forever()
            finally:
                server.close()
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


EXPLORER = Command(
    name="explorer",
    summary="ask a model, edit its memory, and see the answers change",
    description="""\
Serve a page on this machine's loopback: type a text with [MASK], see what the model
says and which entries it read; edit, add or remove entries, unplug a domain, undo.
No weight changes. The store is left alone unless --write is given.""",
    example="""\
pluglm explorer runs/quickstart/run-seed0
pluglm explorer data/articles --model runs/first/model --port 8080 --write""",
    configure=_arguments,
    run=_run,
    after_interrupt="the explorer has ended",
)
