"""How training used the memory: counted while it went on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.charts import Chart, Series, line_chart
from trainer.report.figures import fixed, number, percent
from trainer.report.markup import Html, tag
from trainer.report.run_data import RunData, finite
from trainer.report.tables import bar, scrollable


def while_training(run: RunData) -> list[Html]:
    """The curves, and the counts at the end; nothing where reads were not counted."""
    found = (run.usage or {}).get("training")
    counts = _counts(found) if isinstance(found, Mapping) else []
    charts = _charts(run)
    if not charts and not counts:
        return []
    drawn = tag("div", *(line_chart(chart) for chart in charts), class_="charts")
    return [tag("h3", "While training"), *([drawn] if charts else []), *counts]


def _charts(run: RunData) -> list[Chart]:
    charts = []
    if run.values("memory_used_share"):
        charts.append(
            Chart(
                title="Entries that were ever read",
                unit="% of the memory",
                about="Of the entries that are in the memory at the time.",
                series=[_percentages(run, "memory_used_share", "read")],
            )
        )
    if run.values("memory_read_evenness"):
        names = (("memory_read_evenness", "reads"), ("memory_attended_evenness", "attention"))
        charts.append(
            Chart(
                title="Evenness of the reading",
                unit="entropy over its largest",
                about="1: all entries are read alike, 0: one has it all; between two lines.",
                series=[run.series(name, label) for name, label in names if run.values(name)],
            )
        )
    names = (("memory_top_read_share", "reads"), ("memory_top_attended_share", "attention"))
    if shares := [_percentages(run, name, label) for name, label in names if run.values(name)]:
        charts.append(
            Chart(
                title="Share of the entry that is read most",
                unit="%",
                about="Of all reads, and of all attention, between two lines.",
                series=shares,
            )
        )
    return charts


def _percentages(run: RunData, name: str, label: str) -> Series:
    points = run.series(name, label).points
    return Series(name=label, points=[(s, None if v is None else 100 * v) for s, v in points])


def _counts(found: Mapping[str, Any]) -> list[Html]:
    about = "about " if found.get("estimated") else ""
    never, evenness = finite(found.get("never_used_share")), finite(found.get("read_evenness"))
    hundredth = finite(found.get("reading_of_most_used_hundredth"))
    text = (
        f"Up to step {_number(found, 'to_step')} training read {about}{_number(found, 'used')} of "
        f"the memory's {_number(found, 'entries')} entries, in {_number(found, 'reads')} reads; "
        f"{about}{percent(never)} were never read. The most read hundredth has "
        f"{percent(hundredth)} of the reading; its evenness is {fixed(evenness, 2)}."
    )
    return [
        tag("p", text),
        *_times(found),
        *_shares(found, "by_domain", "Reading by domain while training"),
        *_shares(found, "by_source", "Reading by source while training"),
        *_most_read(found),
    ]


def _number(found: Mapping[str, Any], name: str) -> str:
    return number(finite(found.get(name)))


def _listed(found: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    listed = found.get(name)
    return [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []


def _times(found: Mapping[str, Any]) -> list[Html]:
    bins = _listed(found, "times_read")
    if not bins:
        return []
    rows = [
        tag(
            "tr",
            tag("th", _range(one), scope="row"),
            tag("td", _number(one, "entries")),
        )
        for one in bins
    ]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("times read", "entries")))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="plain")
    return [scrollable(table, "How often entries were read while training")]


def _range(one: Mapping[str, Any]) -> str:
    first, last = _number(one, "from"), _number(one, "to")
    return first if first == last else f"{first} to {last}"


def _shares(found: Mapping[str, Any], name: str, title: str) -> list[Html]:
    shares, attended = found.get(name), found.get(f"attended_{name}")
    if not isinstance(shares, Mapping) or len(shares) < 2:
        return []  # one domain or source takes all: there is nothing to compare
    attended = attended if isinstance(attended, Mapping) else {}
    rows = [
        tag(
            "tr",
            tag("th", key or "(none)", scope="row"),
            tag("td", bar(finite(share) or 0.0, percent(finite(share)))),
            tag("td", percent(finite(share))),
            tag("td", f"{percent(finite(attended.get(key)))} of the attention"),
        )
        for key, share in shares.items()
    ]
    return [tag("h4", title), tag("table", tag("tbody", *rows), class_="shares")]


def _most_read(found: Mapping[str, Any]) -> list[Html]:
    used = _listed(found, "most_used")
    if not used:
        return []
    items = [
        tag(
            "li",
            tag("strong", entry.get("title") or "(no title)"),
            f" ({_number(entry, 'times')} times): ",
            entry.get("text"),
        )
        for entry in used
    ]
    title = "The entries that training read most"
    return [tag("details", tag("summary", title), tag("ul", *items))]
