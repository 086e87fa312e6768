"""Figures of probes as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.cli.text import table
from cluster.probes.consistency import Consistency
from cluster.probes.reading import Fitted
from cluster.probes.scoring import Figures
from cluster.probes.updating import Update

_SHOWN_UNFIT = 3


def _cells(figures: Figures) -> list[str]:
    return [
        *(f"{100 * value:.1f} %" for value in (figures.p_at_1, figures.p_at_10)),
        f"{figures.mrr:.3f}",
        f"{figures.probability:.3f}",
    ]


def describe_fit(fitted: Fitted) -> str:
    """What is asked, and what is not."""
    lines = [f"{len(fitted.probes):,} probes"]
    if fitted.repeated:
        lines.append(f"{fitted.repeated:,} repeat another one and are left out")
    if fitted.unfit:
        shown = "; ".join(fitted.unfit[:_SHOWN_UNFIT])
        lines.append(f"{len(fitted.unfit):,} cannot be asked of this model, such as: {shown}")
    return "\n".join(lines)


def describe_figures(conditions: Mapping[str, Mapping[str, Figures]]) -> str:
    """One row for each group of probes under each condition."""
    groups = list(dict.fromkeys(group for found in conditions.values() for group in found))
    rows = []
    for group in groups:
        for condition, found in conditions.items():
            if group in found:
                figures = found[group]
                rows.append([group, condition, f"{figures.count:,}", *_cells(figures)])
    head = ("probes", "memory", "count", "P@1", "P@10", "MRR", "probability")
    return table(head, rows, most=(32, 20, 9, 8, 8, 7, 11), right=(2, 3, 4, 5, 6))


def describe_consistency(found: Mapping[str, Consistency]) -> str:
    """One row for each condition."""
    rows = [
        [
            condition,
            f"{one.facts:,}",
            *(f"{100 * v:.1f} %" for v in (one.consistency, one.accuracy, one.all_right)),
            "none" if one.when_right is None else f"{100 * one.when_right:.1f} %",
        ]
        for condition, one in found.items()
    ]
    head = ("memory", "facts", "consistent", "right", "right in all ways", "consistent when right")
    return table(head, rows, most=(20, 9, 10, 8, 18, 22), right=(1, 2, 3, 4, 5))


def describe_update(update: Update) -> str:
    """The table of what an edit changed, and what it left alone."""
    before, after, end = update.entries
    lines = [describe_figures(update.stages), ""]
    lines.append(f"entries: {before:,} before, {after:,} after the edit, {end:,} now")
    lines.append(
        f"the edit changed {100 * update.changed:.1f} % of the answers; rolled back, "
        f"{100 * update.returned:.1f} % are as before"
    )
    if update.locality is not None:
        one = update.locality
        lines.append(
            f"of {one.count:,} probes that it is not about, {100 * one.unchanged:.1f} % keep their "
            f"answer (mean change of probability {one.probability_change:.4f}); rolled back, "
            f"{100 * one.returned:.1f} % are as before"
        )
    if not update.restored:
        state = "the rollback did NOT bring back the content of before"
    else:
        state = "the edit is kept" if update.kept else "the memory is as it was"
    lines.append(f"{state}: no weight has changed")
    return "\n".join(lines)


def groups_as_json(found: Mapping[str, Figures]) -> dict[str, dict[str, float]]:
    """Plain values."""
    return {name: dict(vars(figures)) for name, figures in found.items()}
