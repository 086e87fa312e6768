"""`pluglm update`: knowledge edited without training, and what that changes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError
from cluster.cli.memory_options import identity, some_path
from cluster.cli.probe_options import PROBES_HELP, add_common, asked, say

if TYPE_CHECKING:
    from cluster.editing.passages import Knowledge


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--snippets", metavar="COLUMN", help="add the probes' own texts, a column of theirs"
    )
    parser.add_argument(
        "--add", type=some_path, nargs="+", default=[], metavar="FILE", help="add these files"
    )
    parser.add_argument("--domain", metavar="NAME", help="where --add goes (default: default)")
    parser.add_argument(
        "--replace",
        type=some_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows with an id or a doc_id, and the new text",
    )
    parser.add_argument(
        "--replace-with",
        metavar="COLUMN",
        help="put the probes' own texts, a column of theirs, where their facts stand",
    )
    parser.add_argument(
        "--remove", type=identity, nargs="+", default=[], metavar="ID", help="remove entries"
    )
    parser.add_argument(
        "--remove-doc", type=identity, nargs="+", default=[], metavar="DOC_ID", help="documents"
    )
    parser.add_argument(
        "--remove-facts", action="store_true", help="remove the entries in which the facts stand"
    )
    parser.add_argument(
        "--entry",
        metavar="COLUMN",
        help="column with the id of the entry in which a fact stands (default: all entries that "
        "hold its subject and its object)",
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


def _update(options: argparse.Namespace) -> int:
    from cluster.probes.edits import Edits
    from cluster.probes.reading import Columns
    from cluster.probes.shown import describe_update, groups_as_json
    from cluster.probes.updating import update_knowledge

    if options.domain is not None and not options.add:
        raise UsageError("--domain says where --add goes; give --add, or leave --domain out")
    edits = Edits(
        remove_ids=tuple(options.remove),
        remove_doc_ids=tuple(options.remove_doc),
        remove_facts=options.remove_facts,
        replace=_knowledge(options.replace),
        replace_facts=options.replace_with is not None,
        add=_knowledge(options.add),
        domain=options.domain or "default",
        snippets=options.snippets is not None,
    )
    edits.check()
    it = asked(options)
    fitted = it.fitted(
        options.probes,
        prompt=options.prompt,
        columns=Columns(
            known=options.known,
            snippet=options.snippets,
            new_answer=options.new_answer,
            replacement=options.replace_with,
            entry=options.entry,
        ),
        skip_unfit=options.skip_unfit,
    )
    locality = None
    if options.locality is not None:
        locality = it.fitted(
            options.locality, prompt=None, columns=Columns(), skip_unfit=options.skip_unfit
        )
    done = update_knowledge(
        it.trained,
        it.store,
        fitted,
        edits,
        k=it.k,
        locality=locality,
        candidates=it.candidates,
        known_from_memory=options.known_by_memory,
        keep=options.keep,
        say=say,
    )
    if options.json:
        told = asdict(done)
        told["stages"] = {name: groups_as_json(groups) for name, groups in done.stages.items()}
        told |= {"k": it.k, "unfit": len(fitted.unfit), "repeated": fitted.repeated}
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(describe_update(done))
    return 0 if done.restored and done.returned == 1 else 1


def _knowledge(files: list[Path]) -> Knowledge | None:
    from cluster.editing.passages import Knowledge

    return Knowledge(files=tuple(files)) if files else None


UPDATE = Command(
    name="update",
    summary="edit knowledge without training, and measure what changed",
    description=f"""\
Ask, edit the memory, ask again, roll back, ask again: what an edit changes, what it
leaves alone, and that it can be undone. No weight changes. The memory is left as it
was unless --keep is given. Exit code 1: the rollback did not bring all answers back.

{PROBES_HELP}""",
    example="""\
pluglm update runs/first google-re.parquet --snippets snippet --skip-unfit
pluglm update runs/first facts.jsonl --replace corrected.jsonl --locality others.jsonl
pluglm update runs/first facts.jsonl --replace-with new_text --new-answer new_obj
pluglm update runs/first facts.jsonl --remove 17 18 --keep""",
    configure=_update_arguments,
    run=_update,
    after_interrupt="the memory is rolled back to what it was",
)
