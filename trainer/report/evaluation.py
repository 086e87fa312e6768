"""What the memory is worth: the evaluation's table, and what each of its words means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.figures import fixed, percent, signed
from trainer.report.markup import Html, tag
from trainer.report.run_data import RunData, finite
from trainer.report.tables import absent, bar, scrollable, section

CONDITIONS = {
    "right": ("Its own memory", "the model reads the entries that its search finds."),
    "shuffled": (
        "Shuffled memory",
        "it reads entries that were found for other sentences. A loss as low as with its own "
        "memory would mean that what the entries say does not matter.",
    ),
    "none": ("No memory", "the memory is left out."),
}
SLIGHT = 0.01  # nats; a smaller difference in loss is called none


def verdict(run: RunData) -> str:
    """One sentence on what the memory is worth, from the evaluation's first case."""
    cases = _cases(run)
    if not cases:
        return "This run has no evaluation yet, so what its memory is worth is not known."
    right, none = (_figure(cases[0], name, "loss") for name in ("right", "none"))
    if right is None or none is None:
        return "The evaluation holds no loss both with and without the memory to compare."
    gain = none - right
    where = f" (case: {cases[0].get('name', 'the first')})"
    if gain > SLIGHT:
        return (
            f"With its memory the model predicts held-out masked words at a loss of {right:.2f}; "
            f"without it, at {none:.2f}: {100 * gain / none:.0f} % lower{where}."
        )
    if gain < -SLIGHT:
        return (
            f"The memory does harm so far: the held-out loss is {right:.2f} with it and {none:.2f} "
            f"without{where}."
        )
    return (
        f"The memory makes no difference yet: the held-out loss is {right:.2f} with it and "
        f"{none:.2f} without{where}."
    )


def evaluation(run: RunData) -> Html:
    """The table of cases by conditions."""
    title = "What the memory is worth"
    cases = _cases(run)
    if not cases or run.evaluation is None:
        return section("evaluation", title, absent("No evaluation has been made of this run yet."))
    top = max((_figure(c, n, "loss") or 0.0 for c in cases for n in _conditions(c)), default=0.0)
    k, masks = run.evaluation.get("k"), run.evaluation.get("masks")
    shown = {name for case in cases for name in _conditions(case)}
    sizes = [f"{masks:,} masked word pieces"] if isinstance(masks, int) else []
    sizes += [f"{k} entries retrieved for each sentence"] if isinstance(k, int) else []
    head = ("Memory read", "Loss", "", "against none", "Right", "")
    columns = [tag("th", name, scope="col") if name else tag("td") for name in head]
    table = tag(
        "table",
        tag("thead", tag("tr", *columns)),
        *(_case(case, top) for case in cases),
        class_="evaluation",
    )
    return section(
        "evaluation",
        title,
        tag(
            "p",
            f"Measured on text held out of training{': ' if sizes else ''}{', '.join(sizes)}. ",
            "Loss is the mean cross-entropy of a masked word piece in nats, lower is better; right "
            "is the share whose most probable prediction is the true one.",
        ),
        scrollable(table, "Evaluation"),
        tag(
            "dl",
            *(
                tag("div", tag("dt", label), tag("dd", meaning))
                for name, (label, meaning) in CONDITIONS.items()
                if name in shown
            ),
            class_="facts",
        ),
    )


def _cases(run: RunData) -> list[Mapping[str, Any]]:
    cases = run.evaluation.get("cases") if run.evaluation else None
    if not isinstance(cases, list):
        return []
    return [case for case in cases if isinstance(case, Mapping) and _conditions(case)]


def _conditions(case: Mapping[str, Any]) -> list[str]:
    """The case's conditions, those that we know first."""
    found = case.get("conditions")
    if not isinstance(found, Mapping):
        return []
    names = [str(name) for name, values in found.items() if isinstance(values, Mapping)]
    order = list(CONDITIONS)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _figure(case: Mapping[str, Any], condition: str, name: str) -> float | None:
    return finite(case["conditions"].get(condition, {}).get(name))


def _case(case: Mapping[str, Any], top: float) -> Html:
    rate = finite(case.get("right_entry_rate"))
    found = (
        "no entry is the right one here"
        if rate is None
        else f"right entry retrieved for {percent(rate)} of the sentences"
    )
    head = tag(
        "tr",
        tag(
            "th",
            tag("span", case.get("name", "unnamed case"), class_="case"),
            tag("span", found, class_="rate"),
            tag("span", case["note"], class_="note") if case.get("note") else None,
            colspan="6",
            scope="rowgroup",
        ),
    )
    return tag("tbody", head, *_rows(case, top))


def _rows(case: Mapping[str, Any], top: float) -> Sequence[Html]:
    rows = []
    none = _figure(case, "none", "loss")
    for name in _conditions(case):
        label = CONDITIONS.get(name, (name, ""))[0]
        loss, accuracy = _figure(case, name, "loss"), _figure(case, name, "accuracy")
        gain = None if loss is None or none is None or name == "none" else loss - none
        tone = "tone0" if name == "right" else "quiet"
        rows.append(
            tag(
                "tr",
                tag("th", label, scope="row"),
                tag("td", fixed(loss, 3)),
                tag("td", bar(loss / top, f"loss {loss:.3f}", tone) if loss and top else None),
                tag("td", signed(gain, 3)),
                tag("td", percent(accuracy, 1)),
                tag(
                    "td",
                    None if accuracy is None else bar(accuracy, percent(accuracy, 1), tone),
                ),
                class_="own" if name == "right" else None,
            )
        )
    return rows
