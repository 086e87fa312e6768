"""`pluglm memory`: what a memory holds, and what a model would read of it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.text import pairs, size, table

if TYPE_CHECKING:
    from memory_server.manifest import Manifest
    from memory_server.store import Store

_SHOWN_VERSIONS = 10
_WHERE = "a memory's store, or a corpus or run directory, whose memory is taken"


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help=_WHERE)
    parser.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with its checksum"
    )


def _info(options: argparse.Namespace) -> int:
    from cluster.cli.places import memory_path
    from memory_server.store import Store

    store = Store.open(memory_path(options.store))
    print(_describe(store))
    if options.verify:
        store.verify()
        print("\nverified: every file is as it was written")
    return 0


def _describe(store: Store) -> str:
    versions = _versions(store)
    head = versions[0]
    bytes_ = sum(ref.bytes for ref in head.segments)
    removed = sum(ref.deleted for ref in head.segments)
    facts = pairs(
        [
            ("store", str(store.path)),
            ("entries", f"{head.entries:,}" + (f" ({removed:,} removed)" if removed else "")),
            ("segments", f"{len(head.segments):,}, {size(bytes_)}"),
            ("entry", f"up to {store.meta.entry_tokens} tokens"),
            ("tokenizer", f"fingerprint {store.meta.tokenizer_fingerprint}"),
            ("vocabulary", f"{store.meta.vocab_size:,} tokens"),
            ("head", f"{head.version} of {_minute(head)}: {head.message}"),
        ]
    )
    shown = versions[:_SHOWN_VERSIONS]
    rows = [[v.version, _minute(v), f"{v.entries:,}", v.message] for v in shown]
    history = table(
        ("version", "time", "entries", "message"), rows, most=(16, 20, 15, 60), right=(2,)
    )
    heading = f"{len(versions)} versions, the newest first:"
    if len(versions) > len(shown):
        heading = f"{len(versions)} versions, the newest {len(shown)}:"
    return f"{facts}\n\n{heading}\n{history}"


def _versions(store: Store) -> list[Manifest]:
    """The head and its ancestors."""
    found = [store.manifest()]
    while (parent := found[-1].parent) is not None:
        found.append(store.manifest(parent))
    return found


def _minute(manifest: Manifest) -> str:
    return f"{manifest.time[:16].replace('T', ' ')} UTC"


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE|RUN_DIR", help=_WHERE)
    parser.add_argument("sentence", help="what to look for; [MASK] may stand for a word")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="the model that searches (default: the run's own)"
    )
    parser.add_argument(
        "-k", type=positive, default=5, metavar="K", help="entries to show (default: %(default)s)"
    )
    parser.add_argument(
        "--exclude-document",
        type=int,
        metavar="DOC_ID",
        help="leave out this document's entries (--json shows the ids)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where keys and query are computed (default: a GPU if there is one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _search(options: argparse.Namespace) -> int:
    from cluster.cli.places import is_run, memory_path, run_model

    path = memory_path(options.store)
    if options.model is not None:
        model = options.model
    elif is_run(options.store):
        model = run_model(options.store)
    else:
        raise UsageError(
            f"{options.store} is no run directory, so --model is needed; see "
            "`pluglm memory search --help`"
        )
    from cluster.memory_tools import nearest_entries

    hits = nearest_entries(
        path,
        model,
        options.sentence,
        k=options.k,
        exclude_document=options.exclude_document,
        device=options.device,
        say=lambda line: print(line, file=sys.stderr),
    )
    if options.json:
        rows = [
            {
                "rank": hit.rank,
                "score": hit.score,
                "id": hit.entry.id,
                "doc_id": hit.entry.doc_id,
                "title": hit.entry.title,
                "source": hit.entry.source,
                "text": hit.entry.text,
            }
            for hit in hits
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    cells = [
        [str(hit.rank), f"{hit.score:.3f}", hit.entry.title, hit.entry.source, hit.entry.text]
        for hit in hits
    ]
    width = max(40, shutil.get_terminal_size((120, 24)).columns - 70)
    head = ("rank", "score", "title", "source", "text")
    print(table(head, cells, most=(4, 12, 28, 24, width), right=(0, 1)))
    return 0


INFO = Command(
    name="memory info",
    summary="tell what a memory holds, and its versions",
    description="Tell what a memory's store holds: entries, segments, tokenizer and versions.",
    example="""\
pluglm memory info data/articles/memory
pluglm memory info runs/first --verify""",
    configure=_info_arguments,
    run=_info,
)

SEARCH = Command(
    name="memory search",
    summary="show the entries that a model finds for a sentence",
    description="""\
Show the entries nearest to a sentence, as the model sees it: every entry's key is
computed with the model, the sentence is run through it, and the query of its last
memory layer is searched for.""",
    example="""\
pluglm memory search runs/quickstart/run-seed0 "The capital of Portugal is [MASK]."
pluglm memory search data/articles "a river in Asia" --model runs/first/model -k 10 --json""",
    configure=_search_arguments,
    run=_search,
)
