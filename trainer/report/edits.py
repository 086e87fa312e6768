"""Knowledge edited under the trained model: what was asked, changed, answered, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.markup import Html, tag
from trainer.report.run_data import RunData
from trainer.report.tables import absent, scrollable, section

TITLE = "Knowledge edited"
SHOWN = 12


def edits(run: RunData) -> Html:
    """The table of edits; what edits.json holds is described in cluster/demonstration.py."""
    if run.edits is None:
        return section("edits", TITLE, absent("No edit of the memory was tried after this run."))
    cases = [case for case in run.edits.get("cases", ()) if isinstance(case, Mapping)]
    head = ("Asked", "Answer", "Passage edited to say", "Answer then", "Put back")
    rows = [_row(case) for case in cases[:SHOWN]]
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *rows),
        class_="edits",
    )
    return section(
        "edits",
        TITLE,
        tag(
            "p",
            f"One word was changed in {run.edits.get('edits')} passages of the memory, without a "
            f"training step. The answer followed in {run.edits.get('followed')} of them, and was "
            f"the first one again in {run.edits.get('returned')} when the passages were put back.",
        ),
        scrollable(table, TITLE),
    )


def _row(case: Mapping[str, Any]) -> Html:
    cells = ("before", "edited_to", "after", "put_back")
    return tag(
        "tr", tag("td", case.get("sentence")), *(tag("td", case.get(name)) for name in cells)
    )
