"""`pluglm memory log|diff|tag|rollback`: what a memory was, and that again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import (
    SHOWN_WIDTH,
    add_edit_options,
    add_json,
    add_store,
    editor,
    opened_store,
    report_edit,
    whole_number,
)
from cluster.cli.text import snippet, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_server.store.manifest import Manifest
    from memory_server.store.store import Store

_VERSIONS = (
    "A version is named in full, by a unique beginning of four digits or more, by a tag, or HEAD;\n"
    "~n behind any of them means n versions before."
)


def _count(text: str) -> int:
    number = positive(text)
    if number > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {sys.maxsize}, the most")
    return number


def _log_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "-n", type=_count, default=20, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument("--start", metavar="V", help="the newest to show (default: the head)")
    add_json(parser)


def _log(options: argparse.Namespace) -> int:
    store = opened_store(options.store, check=False)
    start = None if options.start is None else store.resolve(options.start)
    entries = list(islice(store.log(start=start), options.n))
    if options.json:
        print(json.dumps([vars(entry) for entry in entries], indent=1, ensure_ascii=False))
        return 0
    rows = [
        [
            entry.version,
            f"{entry.time[:16].replace('T', ' ')} UTC",
            f"{entry.entries:,}",
            ", ".join([*entry.tags, *(["collected"] if entry.collected else [])]),
            entry.message,
        ]
        for entry in entries
    ]
    head = ("version", "time", "entries", "tags", "message")
    print(table(head, rows, most=(16, 20, 15, 30, SHOWN_WIDTH), right=(2,)))
    return 0


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("old", nargs="?", default="HEAD~1", metavar="A", help="default: HEAD~1")
    parser.add_argument("new", nargs="?", default="HEAD", metavar="B", help="default: HEAD")
    parser.add_argument(
        "--show",
        type=whole_number,
        default=10,
        metavar="N",
        help="entries of each kind to show (default: %(default)s)",
    )
    add_json(parser)


def _diff(options: argparse.Namespace) -> int:
    store = opened_store(options.store, check=False)
    old, new = (store.manifest(store.resolve(v)) for v in (options.old, options.new))
    diff = store.diff(old.version, new.version)
    if options.json:
        value = {
            "from": old.version,
            "to": new.version,
            "added": diff.added.tolist(),
            "removed": diff.removed.tolist(),
            "replaced": diff.replaced.tolist(),
            "domains": {name: vars(counts) for name, counts in diff.domains.items()},
        }
        print(json.dumps(value, indent=1, ensure_ascii=False))
        return 0
    print(f"from {old.version} ({old.message}) to {new.version} ({new.message})")
    if diff.is_empty:
        print("no entry differs")
        return 0
    rows = [
        [name, f"+{c.added:,}", f"-{c.removed:,}", f"{c.replaced:,}"]
        for name, c in diff.domains.items()
    ]
    print(table(("domain", "come", "go", "replaced"), rows, most=(30, 15, 15, 15), right=(1, 2, 3)))
    shown = options.show
    _show(store, old, diff.removed[:shown], "-", len(diff.removed))
    _show(store, new, diff.added[:shown], "+", len(diff.added))
    _show(store, old, diff.replaced[:shown], "<", 0)
    _show(store, new, diff.replaced[:shown], ">", len(diff.replaced))
    return 0


def _show(store: Store, version: Manifest, ids: NDArray[np.int64], sign: str, count: int) -> None:
    from cluster.editing.lookup import entries_by_id

    found = entries_by_id(store, version, ids.tolist())
    for entry_id in ids.tolist():
        entry = found[entry_id]
        title = f"{entry.title}: " if entry.title else ""
        print(snippet(f"{sign} {entry_id} {title}{entry.text}", SHOWN_WIDTH + 20))
    if count > len(ids):
        print(f"{sign} … and {count - len(ids):,} more (--show N, or --json for all ids)")


def _tag_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("name", nargs="?", metavar="TAG", help="a new name (default: list them)")
    parser.add_argument("version", nargs="?", metavar="V", help="of what (default: the head)")
    parser.add_argument("--move", action="store_true", help="the name may be in use: move it")
    parser.add_argument("--delete", action="store_true", help="forget the name")
    add_json(parser)


def _tag(options: argparse.Namespace) -> int:
    store = opened_store(options.store, check=False)
    if options.delete and (options.name is None or options.version or options.move):
        raise UsageError("--delete takes a TAG and nothing else")
    if options.delete:
        store.untag(options.name)
    elif options.name is not None:
        version = "HEAD" if options.version is None else options.version
        store.tag(options.name, store.resolve(version), move=options.move)
    tags = store.tags()
    if options.json:
        print(json.dumps(tags, indent=1))
        return 0
    print(_tags_shown(store, tags if options.name is None else {options.name: ""}, tags))
    return 0


def _tags_shown(store: Store, wanted: Sequence[str] | dict[str, str], tags: dict[str, str]) -> str:
    rows = [
        [name, tags[name], store.manifest(tags[name]).message] for name in wanted if name in tags
    ]
    if not rows:
        return "no tag" if not tags else f"tags: {', '.join(tags)}"
    return table(("tag", "version", "message"), rows, most=(40, 16, SHOWN_WIDTH), right=())


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("version", metavar="V", help="the version whose content is wanted again")
    add_edit_options(parser)


def _rollback(options: argparse.Namespace) -> int:
    with editor(options, check=False) as edit:
        return report_edit(edit.rollback(options.version), options)


LOG = Command(
    name="memory log",
    summary="tell a memory's versions, the newest first",
    description="Tell a memory's versions, the newest first.",
    example="""\
pluglm memory log data/articles
pluglm memory log data/articles -n 5 --json""",
    configure=_log_arguments,
    run=_log,
)

DIFF = Command(
    name="memory diff",
    summary="tell which entries differ between two versions",
    description=f"Tell which entries come, go or are replaced between two versions.\n\n{_VERSIONS}",
    example="""\
pluglm memory diff data/articles
pluglm memory diff data/articles HEAD~3 before-news --json""",
    configure=_diff_arguments,
    run=_diff,
)

TAG = Command(
    name="memory tag",
    summary="name a version, or list the names",
    description=f"Name a version. What has a name is kept by `pluglm memory gc`.\n\n{_VERSIONS}",
    example="""\
pluglm memory tag data/articles before-news
pluglm memory tag data/articles published HEAD~2 --move
pluglm memory tag data/articles""",
    configure=_tag_arguments,
    run=_tag,
)

ROLLBACK = Command(
    name="memory rollback",
    summary="go back to an earlier version's content",
    description=f"""\
Commit an earlier version's content once more. Nothing is lost: what came after it
stays in the log, and can be rolled back to in turn.

{_VERSIONS}""",
    example="""\
pluglm memory rollback data/articles HEAD~1 --server wiki
pluglm memory rollback data/articles before-news --dry-run""",
    configure=_rollback_arguments,
    run=_rollback,
)
