"""The page's opening, curves and closing: what happened during the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from trainer.report.charts import line_chart
from trainer.report.curves import curves
from trainer.report.figures import fixed, number, percent, plural, seconds
from trainer.report.markup import Html, join, tag
from trainer.report.run_data import RunData, finite
from trainer.report.tables import absent, scrollable, section, sparse_table


def glance(run: RunData) -> Html:
    """The headline figures."""
    train = run.of_kind("train")
    if not train:
        return section("glance", "At a glance", absent("No training step has been recorded yet."))
    last = train[-1]
    refreshes = run.of_kind("refresh")
    still = sum(run.values("seconds_stood_still", kind="refresh"))
    tiles = [
        ("optimizer steps", f"{last['step']:,}", _took(last)),
        ("masked-LM loss", number(_recent(run, "mlm_loss") or _recent(run, "loss")), "end of run"),
    ]
    if run.values("right_entry_rate"):
        tiles.append(("right entry found", percent(_recent(run, "right_entry_rate")), "end of run"))
    for name, label in (("sequences_per_s", "sequences / s"), ("retrieval_ms", "retrieval, ms")):
        if values := run.values(name):
            tiles.append((label, number(median(values)), "median step"))
    note = f"{seconds(still)} stood still" if refreshes else "keys never renewed"
    tiles.append(("memory refreshes", f"{len(refreshes):,}", note))
    if values := run.values("rss_gib"):
        tiles.append(("GiB per trainer", number(max(values)), "largest"))
    return section(
        "glance",
        "At a glance",
        tag(
            "dl",
            *(
                tag("div", tag("dt", name), tag("dd", value, tag("small", note)))
                for name, value, note in tiles
            ),
            class_="tiles",
        ),
    )


def training(run: RunData) -> Html:
    """The curves, the refreshes and the events."""
    if not run.of_kind("train"):
        return section("training", "How training went", absent("There are no curves to draw yet."))
    charts = curves(run)
    lost = sum(1 for line in run.of_kind("train") if "loss" in line and line["loss"] is None)
    left_out = round(sum(run.values("skipped_steps")))
    columns = [
        (f"{series.name} ({chart.unit})", series) for chart in charts for series in chart.series
    ]
    return section(
        "training",
        "How training went",
        tag(
            "p",
            "Point at a chart to read its numbers. A line is the mean over a stretch of steps, the "
            "band behind it reaches from the lowest to the highest of them.",
        ),
        tag("p", f"The loss was not a number at {plural(lost, 'step')}.", class_="warning")
        if lost
        else None,
        tag(
            "p",
            f"{plural(left_out, 'step')} left out: loss or gradient was not finite.",
            class_="warning",
        )
        if left_out
        else None,
        tag("div", *(line_chart(chart) for chart in charts), class_="charts"),
        tag(
            "details",
            tag("summary", "The same numbers as a table"),
            scrollable(sparse_table(columns), "Numbers of the charts"),
        ),
        _restarts(run.of_kind("restart")),
        _refreshes(run.of_kind("refresh")),
        _events(run.of_kind("event")),
    )


def configuration(run: RunData) -> Html:
    """The resolved configuration, one list a section of the file."""
    if run.config is None:
        return section("config", "Configuration", absent("No config.toml in the run directory."))
    loose = {k: v for k, v in run.config.items() if not isinstance(v, Mapping)}
    groups: list[tuple[str, Mapping[str, Any]]] = [("general", loose)] if loose else []
    groups += [(k, v) for k, v in run.config.items() if isinstance(v, Mapping)]
    return section(
        "config",
        "Configuration",
        tag(
            "div",
            *(
                tag(
                    "div",
                    tag("h3", name),
                    tag(
                        "dl",
                        *(
                            tag("div", tag("dt", key), tag("dd", _setting(value)))
                            for key, value in values.items()
                        ),
                    ),
                )
                for name, values in groups
            ),
            class_="settings",
        ),
    )


def text_source(run: RunData) -> Html:
    """Where the text comes from and under which licence."""
    notes = run.notes or {}
    lines = [
        tag("div", tag("dt", label), tag("dd", notes[key]))
        for key, label in (("source", "Source"), ("licence", "Licence"))
        if notes.get(key)
    ]
    if not lines:
        lines = [absent("No note on the text's source and licence was recorded with this run.")]
        return section("text", "The text", *lines)
    return section("text", "The text", tag("dl", *lines, class_="facts"))


def _took(last: Mapping[str, Any]) -> str:
    spent = finite(last.get("time_s"))
    return "" if spent is None else f"in {seconds(spent)}"


def _recent(run: RunData, name: str) -> float | None:
    """The mean over the last tenth of the run, at least 1 and at most 50 recorded lines."""
    values = run.values(name)
    if not values:
        return None
    tail = values[-max(1, min(50, len(values) // 10)) :]
    return sum(tail) / len(tail)


def _restarts(lines: Sequence[Mapping[str, Any]]) -> Html | None:
    """What befell the run, and what it cost; nothing if nothing did."""
    if not lines:
        return None
    columns = ("from step", "what happened", "steps done again", "training again after", "trainers")
    rows = [
        tag(
            "tr",
            tag("th", f"{line['step']:,}", scope="row"),
            tag("td", line.get("reason")),
            tag("td", number(finite(line.get("steps_again")))),
            tag("td", seconds(finite(line.get("seconds")))),
            tag("td", number(finite(line.get("trainers")))),
        )
        for line in lines
    ]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    table = tag("table", head, tag("tbody", *rows), class_="plain")
    title = f"Trainers were started again {plural(len(lines), 'time')}"
    return tag(
        "details", tag("summary", title), scrollable(table, "Faults and restarts"), open=True
    )


def _refreshes(lines: Sequence[Mapping[str, Any]]) -> Html:
    if not lines:
        return absent("The memory was not refreshed during this run.")
    columns = (
        "live at step",
        "epoch",
        "keys of step",
        "mode",
        "took",
        "training stood still",
        "cosine of old and new keys",
        "nearest entries kept",
    )
    rows = [
        tag(
            "tr",
            tag("th", f"{line['step']:,}", scope="row"),
            tag("td", line.get("epoch")),
            tag("td", number(finite(line.get("encoder_step")))),
            tag("td", line.get("mode")),
            tag("td", seconds(finite(line.get("seconds_total")))),
            tag("td", seconds(finite(line.get("seconds_stood_still")))),
            tag("td", fixed(finite(line.get("key_cosine")), 4)),
            tag("td", percent(finite(line.get("key_neighbours_kept")))),
        )
        for line in lines
    ]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    table = tag("table", head, tag("tbody", *rows), class_="plain")
    title = plural(len(lines), "memory refresh", "memory refreshes")
    return tag("details", tag("summary", title), scrollable(table, "Refreshes"))


def _events(lines: Sequence[Mapping[str, Any]]) -> Html | None:
    if not lines:
        return None
    items = [
        tag("li", tag("b", f"step {line['step']:,}"), " ", line.get("message")) for line in lines
    ]
    return tag("details", tag("summary", plural(len(lines), "event")), tag("ul", *items))


def _setting(value: object) -> Html:
    if isinstance(value, bool):
        return join("yes" if value else "no")
    if isinstance(value, list):
        return join(", ".join(str(item) for item in value) or "none")
    if isinstance(value, Mapping):
        return join(", ".join(f"{k} = {v}" for k, v in value.items()) or "none")
    return join("empty" if value == "" else str(value))
