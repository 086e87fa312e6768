"""What the `memory` commands share: the store, the server that shows an edit, and the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.text import size, snippet, table

if TYPE_CHECKING:
    from cluster.editing.edits import Editor
    from cluster.editing.outcome import Edit
    from memory_server.actors.client import RayMemory
    from memory_server.store.store import Store

STORE_HELP = (
    "a memory's store (a directory or a URL), or a corpus or run directory, whose memory is taken"
)
SHOWN_WIDTH = 70
_INT64_MAX = 2**63 - 1


def whole_number(text: str) -> int:
    """An argument that is a whole number from 0 upwards, such as an id."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return number


def identity(text: str) -> int:
    """An argument that is the id of an entry or a document."""
    number = whole_number(text)
    if number > _INT64_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no id: they are from 0 to 2**63-1")
    return number


def unicode_text(text: str) -> str:
    """An argument that is stored or tokenised, and so must be valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is no valid UTF-8") from None
    return text


def message(text: str) -> str:
    """An argument that the log is to say of a commit."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the message is empty; give one, or leave the option out")
    return unicode_text(text)


def some_path(text: str) -> Path:
    """An argument that can be the name of a file."""
    return Path(place(text))


def place(text: str) -> str:
    """An argument that is a path or a URL."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!a} holds a NUL, which no file's name does")
    return text


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=place, metavar="STORE", help=STORE_HELP)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def add_server(parser: argparse.ArgumentParser, *, does: str) -> None:
    """`--server` and `--address`; `does` says what the named server is for."""
    parser.add_argument("--server", metavar="NAME", help=does)
    add_address(parser)


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default="auto",
        metavar="ADDR",
        help='the Ray that servers run in: "auto" (this machine\'s) or host:port '
        "(default: %(default)s)",
    )


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """What every edit takes."""
    parser.add_argument(
        "-m", "--message", type=message, metavar="TEXT", help="what the log says of this edit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would change, with examples, and commit nothing",
    )
    add_server(
        parser,
        does="a running memory server of this store: return when every later reply reflects the "
        "edit",
    )
    add_json(parser)


def opened_store(given: str, *, check: bool = True) -> Store:
    """The store that an argument leads to.

    Args:
        check: False for what need not read the head's segments, one of which may be damaged.

    Raises:
        FileNotFoundError, StoreError: there is none, or it is damaged.
    """
    from cluster.cli.places import memory_path
    from memory_server.store.store import Store

    location = given if "://" in given else str(memory_path(Path(given)))
    return Store.open(location, check=check)


def near_store(given: str) -> tuple[Path, ...]:
    """Where the tokenizer of the store that an argument leads to may lie."""
    from cluster.cli.places import is_run, run_config
    from trainer.corpus.remote import local_corpus

    if "://" in given:
        return ()
    path = Path(given)
    if is_run(path):
        return (path, local_corpus(run_config(path).data.corpus))
    return (path,)


@contextmanager
def given_server(options: argparse.Namespace) -> Iterator[RayMemory | None]:
    """The server that --server names, attached to, or None."""
    with ExitStack() as stack:
        memory = None
        if options.server is not None:
            from cluster.memory_servers import attached

            memory = stack.enter_context(attached(options.server, options.address))
        yield memory


def _tell_where(given: str, store: str) -> None:
    """A run names its memory by a path, which a copy of the run shares: say what is edited."""
    if "://" in given:
        return
    place = Path(given).resolve()
    if "://" in store or place not in (Path(store).resolve(), *Path(store).resolve().parents):
        print(f"the memory of {given} is {store}", file=sys.stderr)


@contextmanager
def editor(options: argparse.Namespace, *, check: bool = True) -> Iterator[Editor]:
    """The store's editor, as the options of `add_edit_options` and of the tokenizer say.

    Args:
        check: False for an edit that leads away from damage, and so must work beside it.
    """
    from cluster.editing.edits import Editor, TokenizerPlace

    store = opened_store(options.store, check=check)
    _tell_where(options.store, store.location)
    place = TokenizerPlace(
        given=getattr(options, "tokenizer", None),
        near=near_store(options.store),
        title_in_entry=getattr(options, "title_in_entry", None),
    )
    with given_server(options) as memory:
        yield Editor(
            store=store,
            memory=memory,
            message=options.message,
            dry_run=options.dry_run,
            tokenizer=place,
        )


def report_edit(edit: Edit, options: argparse.Namespace) -> int:
    """Print what an edit did or would do, as text or JSON; the exit code."""
    if options.json:
        print(json.dumps(edit_as_dict(edit, options.server), indent=1, ensure_ascii=False))
    else:
        print(edit_as_text(edit, options.server))
    return 0


def edit_as_dict(edit: Edit, server: str | None) -> dict[str, Any]:
    """An edit for other programs."""
    counts, read = edit.counts, edit.read
    sample = [] if read is None else read.sample
    return {
        "dry_run": edit.version is None,
        "version": edit.version,
        "parent": edit.parent,
        "message": edit.message,
        "added": counts.added,
        "removed": counts.removed,
        "replaced": counts.replaced,
        "entries_before": counts.before,
        "entries_after": counts.after,
        "bytes_to_write": counts.bytes_to_write,
        "uncertain": counts.uncertain,
        "domains": {name: vars(change) for name, change in counts.domains.items()},
        "added_ids": list(counts.added_ids),
        "removed_ids": list(counts.removed_ids),
        "read": None
        if read is None
        else {"passages": read.passages, "empty": read.empty, "entries": read.entries},
        "sample": [vars(entry) for entry in sample],
        "server": None if edit.epoch is None else {"name": server, "epoch": edit.epoch},
    }


def edit_as_text(edit: Edit, server: str | None) -> str:
    """An edit for a person."""
    counts, read = edit.counts, edit.read
    lines = []
    if read is not None:
        empty = f" ({read.empty:,} without text)" if read.empty else ""
        lines.append(f"read {read.passages:,} passages{empty}: {read.entries:,} entries")
    replaced = f", {counts.replaced:,} of them replaced" if counts.replaced else ""
    lines.append(
        f"{counts.added:,} entries come, {counts.removed:,} go{replaced}: {counts.before:,} → "
        f"{counts.after:,}"
    )
    if counts.uncertain is not None:
        lines.append(f"counted by whole segments, as {counts.uncertain}")
    rows = [
        [name, f"{c.before:,}", f"{c.after:,}", f"+{c.added:,}", f"-{c.removed:,}"]
        for name, c in counts.domains.items()
    ]
    head = ("domain", "before", "after", "come", "go")
    lines.append(table(head, rows, most=(30, 15, 15, 15, 15), right=(1, 2, 3, 4)))
    if edit.version is None:
        if read is not None:
            lines += [
                f"  entry {e.id} of document {e.doc_id}: {snippet(e.text, SHOWN_WIDTH)}"
                for e in read.sample
            ]
        for word, ids in (("come", counts.added_ids), ("go", counts.removed_ids)):
            if ids:
                lines.append(f"ids that {word}, such as: {', '.join(map(str, ids))}")
        lines.append(
            f"dry run: nothing is committed; it would write {size(counts.bytes_to_write)}, as "
            f"{edit.message!r}"
        )
    else:
        lines.append(f"version {edit.version}: {edit.message}")
    if edit.epoch is not None:
        lines.append(f"the server {server} answers from it (epoch {edit.epoch})")
    return "\n".join(lines)
