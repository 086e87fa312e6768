"""`pluglm memory plug|unplug|swap`: whole domains of a memory, in one commit each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError
from cluster.cli.memory_edit import add_knowledge, given_knowledge
from cluster.cli.memory_options import (
    add_edit_options,
    add_store,
    editor,
    opened_store,
    place,
    report_edit,
)

if TYPE_CHECKING:
    from cluster.editing.edits import NewDomain

_SOURCES = """\
It comes from files (--from), from another store's domain (--from-store), or,
given neither, from this store's own history: as the newest version had it, or
the one that --version names."""


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    add_knowledge(parser, from_flag=True)
    parser.add_argument(
        "--from-store", type=place, metavar="STORE", help="another memory with the same tokenizer"
    )
    parser.add_argument(
        "--from-domain",
        metavar="NAME",
        help="the domain there (default: the only one that it has)",
    )
    parser.add_argument("--version", metavar="V", help="an earlier version of this store")
    add_edit_options(parser)


def _source(options: argparse.Namespace) -> NewDomain:
    from cluster.editing.edits import NewDomain

    given = {
        "--from": options.files,
        "--from-store": options.from_store,
        "--version": options.version,
    }
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)}: a domain comes from one of them; give one")
    if options.from_domain and not options.from_store:
        raise UsageError("--from-domain needs --from-store")
    return NewDomain(
        knowledge=given_knowledge(options) if options.files else None,
        store=opened_store(options.from_store) if options.from_store else None,
        domain=options.from_domain,
        version=options.version,
    )


def _plug_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("domain", metavar="DOMAIN", help="the domain to plug")
    _source_arguments(parser)


def _plug(options: argparse.Namespace) -> int:
    source = _source(options)
    with editor(options) as edit:
        return report_edit(edit.plug(options.domain, source), options)


def _unplug_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("domain", metavar="DOMAIN", help="the domain to take out")
    add_edit_options(parser)


def _unplug(options: argparse.Namespace) -> int:
    with editor(options, check=False) as edit:
        return report_edit(edit.unplug(options.domain), options)


def _swap_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("old", metavar="OLD", help="the domain that goes")
    parser.add_argument("new", metavar="NEW", help="the domain that comes; OLD: its new content")
    _source_arguments(parser)


def _swap(options: argparse.Namespace) -> int:
    source = _source(options)
    with editor(options) as edit:
        return report_edit(edit.swap(options.old, options.new, source), options)


PLUG = Command(
    name="memory plug",
    summary="plug a domain in",
    description=f"Plug a domain into a memory, in one commit.\n\n{_SOURCES}",
    example="""\
pluglm memory plug data/articles biomed --from papers.parquet
pluglm memory plug data/articles law --from-store data/law --server wiki
pluglm memory plug data/articles biomed""",
    configure=_plug_arguments,
    run=_plug,
)

UNPLUG = Command(
    name="memory unplug",
    summary="take a domain out",
    description="""\
Take a whole domain out of a memory, in one commit. No entry is read or removed:
`pluglm memory plug` brings it back.""",
    example="pluglm memory unplug data/articles biomed --server wiki",
    configure=_unplug_arguments,
    run=_unplug,
)

SWAP = Command(
    name="memory swap",
    summary="one domain for another, in one step",
    description=f"""\
Take one domain out and plug another in, in one commit, so that no answer sees both
or neither.

{_SOURCES}""",
    example="""\
pluglm memory swap data/articles news-may news-june --from june.jsonl --server wiki
pluglm memory swap data/articles news news --from corrected.jsonl
pluglm memory swap data/articles news-june news-may""",
    configure=_swap_arguments,
    run=_swap,
)
