"""`pluglm memory add|remove|update`: entries of a memory, changed by one commit each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError
from cluster.cli.memory_options import (
    add_edit_options,
    add_store,
    editor,
    identity,
    report_edit,
    some_path,
    unicode_text,
)

if TYPE_CHECKING:
    from cluster.editing.passages import Knowledge

_FILES = """\
FILES are what `pluglm corpus build` reads: text (.txt, blank lines part documents),
JSON Lines, JSON, CSV, Parquet, Arrow, some as .gz, or directories of them. Their
rows may have title, source, doc_id and id beside the text, or `tokens` (the token
ids of one whole entry, [CLS] included) in its place. Text is cut into entries by
the memory's own tokenizer."""


def add_knowledge(parser: argparse.ArgumentParser, *, from_flag: bool = False) -> None:
    """The files, or one text; after `--from` where the words before are taken."""
    if from_flag:
        parser.add_argument(
            "--from",
            dest="files",
            type=some_path,
            nargs="+",
            metavar="FILE",
            help="files of entries",
        )
    else:
        parser.add_argument(
            "files", type=some_path, nargs="*", metavar="FILE", help="files of entries"
        )
        parser.add_argument(
            "--text", type=unicode_text, metavar="TEXT", help="one text instead of files"
        )
        parser.add_argument("--title", type=unicode_text, default="", help="title of --text")
        parser.add_argument("--source", type=unicode_text, default="", help="where --text is from")
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a row that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--title-field",
        default="title",
        metavar="NAME",
        help="field of a row that holds the title (default: %(default)s)",
    )
    parser.add_argument(
        "--title-in-entry",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin each entry with its title (default: as the memory's corpus was built)",
    )
    parser.add_argument(
        "--tokenizer",
        type=some_path,
        metavar="DIR",
        help="the tokenizer that made the memory, or a model with it (default: looked for beside "
        "the store)",
    )


def given_knowledge(options: argparse.Namespace) -> Knowledge:
    """What the arguments of `add_knowledge` say.

    Raises:
        UsageError: neither files nor a text, or both.
    """
    from cluster.editing.passages import Knowledge

    text = getattr(options, "text", None)
    if bool(options.files) == (text is not None):
        raise UsageError("give either files or --text; see `pluglm memory add --help`")
    return Knowledge(
        files=tuple(options.files or ()),
        text=text,
        title=getattr(options, "title", ""),
        source=getattr(options, "source", ""),
        text_field=options.text_field,
        title_field=options.title_field,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_knowledge(parser)
    parser.add_argument(
        "--domain", default="default", metavar="NAME", help="where to (default: %(default)s)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="given ids may live already: replace those entries"
    )
    add_edit_options(parser)


def _add(options: argparse.Namespace) -> int:
    knowledge = given_knowledge(options)
    with editor(options) as edit:
        done = edit.add(knowledge, domain=options.domain, replace=options.replace)
        return report_edit(done, options)


def _remove_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--id", type=identity, nargs="+", default=[], metavar="ID", help="entries")
    parser.add_argument(
        "--doc-id",
        type=identity,
        nargs="+",
        default=[],
        metavar="DOC_ID",
        help="documents, with all their entries",
    )
    parser.add_argument(
        "--domain", nargs="+", default=[], metavar="NAME", help="domains, with all their entries"
    )
    parser.add_argument(
        "--ids-from",
        type=some_path,
        metavar="FILE",
        help="entries by id, one a line; - is the input",
    )
    add_edit_options(parser)


def _remove(options: argparse.Namespace) -> int:
    from cluster.editing.id_files import ids_in

    ids = list(options.id)
    if options.ids_from is not None:
        ids += ids_in(options.ids_from)
    if not (ids or options.doc_id or options.domain):
        raise UsageError(
            "nothing to remove is named; give --id, --doc-id, --domain or --ids-from (see "
            "`pluglm memory remove --help`)"
        )
    with editor(options) as edit:
        done = edit.remove(ids=ids, doc_ids=options.doc_id, domains=options.domain)
        return report_edit(done, options)


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_knowledge(parser)
    parser.add_argument("--id", type=identity, metavar="ID", help="the entry to replace")
    parser.add_argument("--doc-id", type=identity, metavar="DOC_ID", help="the document to replace")
    add_edit_options(parser)


def _update(options: argparse.Namespace) -> int:
    knowledge = given_knowledge(options)
    if options.text is not None and options.id is None and options.doc_id is None:
        raise UsageError("say what --text replaces: give --id or --doc-id")
    with editor(options) as edit:
        done = edit.update(knowledge, entry_id=options.id, doc_id=options.doc_id)
        return report_edit(done, options)


ADD = Command(
    name="memory add",
    summary="add knowledge from files, or one text",
    description=f"""\
Add entries to a memory, in one commit. Nothing is committed unless every row is good.

{_FILES}""",
    example="""\
pluglm memory add data/articles news.jsonl --message "news of May"
pluglm memory add data/articles --text "Ada Lovelace wrote the first program." --title Ada
pluglm memory add data/articles papers.parquet --domain biomed --dry-run
pluglm memory add runs/first news.jsonl --server wiki""",
    configure=_add_arguments,
    run=_add,
)

REMOVE = Command(
    name="memory remove",
    summary="remove entries, documents or domains",
    description="Remove entries from a memory, in one commit. Earlier versions keep them.",
    example="""\
pluglm memory remove data/articles --id 17 18
pluglm memory remove data/articles --doc-id 4 --message "withdrawn" --server wiki
pluglm memory remove data/articles --ids-from wrong.txt --dry-run""",
    configure=_remove_arguments,
    run=_remove,
)

UPDATE = Command(
    name="memory update",
    summary="replace entries or documents by new text",
    description=f"""\
Put new text in the place of old, in one commit. A row with an id replaces that entry,
which keeps its id; rows with only a doc_id replace all entries of that document.
--id or --doc-id says so for rows without.

{_FILES}""",
    example="""\
pluglm memory update data/articles --id 17 --text "The tower is 330 m high."
pluglm memory update data/articles corrected.jsonl --message "corrections" --server wiki
pluglm memory update data/articles page.txt --doc-id 4""",
    configure=_update_arguments,
    run=_update,
)
