"""`pluglm memory info|search`: what a memory holds, and what a model would read of it."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, domain_names, positive
from cluster.cli.memory_options import (
    STORE_HELP,
    add_json,
    add_server,
    identity,
    opened_store,
    place,
    some_path,
    unicode_text,
)
from cluster.cli.text import pairs, size, table

if TYPE_CHECKING:
    from cluster.memory_tools import Hit
    from memory_server.api import MemoryInfo
    from memory_server.store.history import LogEntry
    from memory_server.store.store import Store

_SHOWN_VERSIONS = 10


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", type=place, metavar="STORE", help=STORE_HELP)
    parser.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with its checksum"
    )
    add_server(parser, does="tell what this running memory server answers from, without a STORE")


def _info(options: argparse.Namespace) -> int:
    if (options.store is None) == (options.server is None):
        raise UsageError("give either a STORE or --server NAME; see `pluglm memory info --help`")
    if options.server is not None:
        if options.verify:
            raise UsageError("--verify is of a STORE; give one in the place of --server")
        from cluster.memory_servers import attached

        with attached(options.server, options.address) as memory:
            print(_describe_server(options.server, memory.info()))
        return 0
    store = opened_store(options.store)
    print(_describe(store))
    if options.verify:
        store.verify()
        print("\nverified: every file is as it was written")
    return 0


def _describe_server(name: str, info: MemoryInfo) -> str:
    return pairs(
        [
            ("memory", name),
            ("entries", f"{info.entries:,} in {info.shards} shards, {info.index}"),
            ("entry", f"up to {info.entry_tokens} tokens"),
            ("keys", f"{info.key_width} wide, of step {info.encoder_step}"),
            ("tokenizer", f"fingerprint {info.tokenizer_fingerprint}"),
            ("version", info.content_version),
            ("epoch", str(info.epoch)),
            ("bytes", ", ".join(f"{part} {size(n)}" for part, n in info.bytes.items())),
        ]
    )


def _describe(store: Store) -> str:
    head = store.manifest()
    bytes_ = sum(ref.bytes for ref in head.segments)
    removed = sum(ref.deleted for ref in head.segments)
    domains = [f"{name} ({count:,})" for name, count in head.domains().items()]
    versions = list(islice(store.log(), _SHOWN_VERSIONS + 1))
    facts = pairs(
        [
            ("store", store.location),
            ("entries", f"{head.entries:,}" + (f" ({removed:,} removed)" if removed else "")),
            ("domains", ", ".join(domains) or "none"),
            ("segments", f"{len(head.segments):,}, {size(bytes_)}"),
            ("entry", f"up to {store.meta.entry_tokens} tokens"),
            ("tokenizer", f"fingerprint {store.meta.tokenizer_fingerprint}"),
            ("vocabulary", f"{store.meta.vocab_size:,} tokens"),
            ("head", f"{head.version} of {_minute(versions[0])}: {head.message}"),
        ]
    )
    shown = versions[:_SHOWN_VERSIONS]
    rows = [[v.version, _minute(v), f"{v.entries:,}", v.message] for v in shown]
    history = table(
        ("version", "time", "entries", "message"), rows, most=(16, 20, 15, 60), right=(2,)
    )
    heading = f"{len(versions)} versions, the newest first:"
    if len(versions) > len(shown):
        heading = f"the newest {len(shown)} versions (`pluglm memory log` tells them all):"
    return f"{facts}\n\n{heading}\n{history}"


def _minute(version: LogEntry) -> str:
    return f"{version.time[:16].replace('T', ' ')} UTC"


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", type=place, metavar="STORE|RUN_DIR", help=STORE_HELP)
    parser.add_argument(
        "sentence", type=unicode_text, help="what to look for; [MASK] may stand for a word"
    )
    parser.add_argument(
        "--model",
        type=some_path,
        metavar="DIR",
        help="the model that searches (default: the run's own)",
    )
    parser.add_argument(
        "-k", type=positive, default=5, metavar="K", help="entries to show (default: %(default)s)"
    )
    parser.add_argument(
        "--exclude-document",
        type=identity,
        metavar="DOC_ID",
        help="leave out this document's entries (--json shows the ids)",
    )
    parser.add_argument(
        "--domains",
        type=domain_names,
        default=(),
        metavar="A,B",
        help="search only the entries of these domains (default: of all that are plugged)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where keys and query are computed (default: a GPU if there is one)",
    )
    add_server(
        parser, does="ask this running memory server, with its keys; STORE may then be left out"
    )
    add_json(parser)


def _search(options: argparse.Namespace) -> int:
    hits = _from_store(options) if options.server is None else _from_server(options)
    return _print_hits(hits, options)


def _from_store(options: argparse.Namespace) -> list[Hit]:
    from cluster.cli.places import memory_path

    if options.store is None:
        raise UsageError("give a STORE or RUN_DIR before the sentence, or --server NAME")
    path = memory_path(Path(options.store)) if "://" not in options.store else options.store
    model = _model(options)
    from cluster.memory_tools import nearest_entries

    with _said_once():
        return nearest_entries(
            path,
            model,
            options.sentence,
            k=options.k,
            exclude_document=options.exclude_document,
            domains=options.domains,
            device=options.device,
            say=lambda line: print(line, file=sys.stderr),
        )


@contextmanager
def _said_once() -> Iterator[None]:
    """Keep a shard of this process from logging why its epoch failed: the error says it."""
    from memory_server.shard.shard import log

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("epoch %d not staged")

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def _from_server(options: argparse.Namespace) -> list[Hit]:
    model = _model(options)
    from cluster.memory_servers import attached
    from cluster.memory_tools import nearest_in

    with attached(options.server, options.address, domains=options.domains) as memory:
        return nearest_in(
            memory,
            model,
            options.sentence,
            k=options.k,
            exclude_document=options.exclude_document,
            device=options.device,
        )


def _model(options: argparse.Namespace) -> Path:
    """The model that is given, or the run's own."""
    from cluster.cli.places import is_run, run_model

    if options.model is not None:
        given: Path = options.model
        return given
    if options.store is not None and is_run(Path(options.store)):
        return run_model(Path(options.store))
    where = "no run directory is given" if options.store is None else ""
    where = where or f"{options.store} is no run directory"
    raise UsageError(f"{where}, so --model is needed; see `pluglm memory search --help`")


def _print_hits(hits: list[Hit], options: argparse.Namespace) -> int:
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
    description="""\
Tell what a memory's store holds: entries, domains, segments, tokenizer and versions;
or what a running memory server answers from.""",
    example="""\
pluglm memory info data/articles/memory
pluglm memory info runs/first --verify
pluglm memory info --server wiki""",
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
pluglm memory search data/articles "a river in Asia" --model runs/first/model -k 10 --json
pluglm memory search "a river in Asia" --server wiki --model runs/first/model --domains geo""",
    configure=_search_arguments,
    run=_search,
)
