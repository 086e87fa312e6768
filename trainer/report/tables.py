"""The page's small building blocks: sections, tables of numbers, bars."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.report.charts import Series
from trainer.report.figures import number
from trainer.report.markup import Html, tag


def section(anchor: str, title: str, *content: object) -> Html:
    """A titled section that the page's navigation can point to."""
    heading = tag("h2", title, id=f"{anchor}-title")
    return tag("section", heading, *content, id=anchor, aria_labelledby=f"{anchor}-title")


def absent(message: str) -> Html:
    """A part of the run that is not there, said plainly."""
    return tag("p", message, class_="absent")


def scrollable(table: Html, name: str) -> Html:
    """A table that scrolls by itself when the window is narrower; the keyboard reaches it."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def bar(share: float, label: str, tone: str = "") -> Html:
    """A horizontal bar of a share of 1, with the number in words for screen readers."""
    width = 100 * min(max(share, 0.0), 1.0)
    return tag(
        "span",
        tag("span", style=f"width:{width:.1f}%", class_=f"fill {tone}".strip()),
        role="img",
        aria_label=label,
        title=label,
        class_="bar",
    )


def sparse_table(chart_columns: Sequence[tuple[str, Series]], rows: int = 20) -> Html:
    """The charts' numbers as a table of at most ``rows`` evenly spaced steps."""
    lookup = [dict(series.points) for _, series in chart_columns]
    steps = sorted({step for column in lookup for step in column})
    if len(steps) > rows:
        steps = [steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)]
    head = tag(
        "tr",
        tag("th", "step", scope="col"),
        *(tag("th", name, scope="col") for name, _ in chart_columns),
    )
    body = [
        tag(
            "tr",
            tag("th", f"{step:,}", scope="row"),
            *(tag("td", number(column.get(step))) for column in lookup),
        )
        for step in steps
    ]
    return tag("table", tag("thead", head), tag("tbody", *body), class_="plain")
