"""What an experiment came to: means over seeds, paired comparisons, a section of a document."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.experiments.plan import Experiment
from cluster.experiments.running import Place, number_at, stage_result
from trainer.finetune.paired import PairedDifference, paired_difference


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure: its values by seed, their mean and sample standard deviation."""

    name: str
    values: tuple[float, ...]
    mean: float
    std: float | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison: what `larger` is above `smaller`, seed by seed."""

    name: str
    larger: str
    smaller: str
    difference: PairedDifference


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was measured."""

    seeds: tuple[int, ...]
    measures: tuple[Measured, ...]
    comparisons: tuple[Compared, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def results_of(place: Place) -> Results:
    """Read the finished stages' results. Raises ConfigError: a measure is not where it is said."""
    experiment = place.experiment
    values: dict[str, tuple[float, ...]] = {}
    for measure in experiment.measures:
        if measure.mean_of:
            found = [values[name] for name in measure.mean_of]
            values[measure.name] = tuple(map(statistics.fmean, zip(*found, strict=True)))
            continue
        values[measure.name] = tuple(
            number_at(stage_result(place, measure.at[0], seed), measure.at[1:])
            for seed in experiment.seeds
        )
    return summed(experiment, values)


def summed(experiment: Experiment, values: dict[str, tuple[float, ...]]) -> Results:
    """The means, and the comparisons that the experiment names."""
    return Results(
        seeds=experiment.seeds,
        measures=tuple(
            Measured(
                name=name,
                values=of,
                mean=statistics.fmean(of),
                std=statistics.stdev(of) if len(of) > 1 else None,
            )
            for name, of in values.items()
        ),
        comparisons=tuple(
            Compared(
                name=each.name,
                larger=each.larger,
                smaller=each.smaller,
                difference=paired_difference(values[each.larger], values[each.smaller]),
            )
            for each in experiment.comparisons
        ),
    )


def described(results: Results) -> str:
    """Markdown: a table of the measures, and one of the comparisons."""
    head = ["measure", "mean", "deviation", *(f"seed {seed}" for seed in results.seeds)]
    rows = [
        [
            each.name,
            f"{each.mean:.4f}",
            "" if each.std is None else f"{each.std:.4f}",
            *(f"{value:.4f}" for value in each.values),
        ]
        for each in results.measures
    ]
    parts = [_table(head, rows)]
    if results.comparisons:
        rows = []
        for one in results.comparisons:
            difference = one.difference
            rows.append(
                [
                    one.name,
                    f"{difference.mean:+.4f}",
                    "" if difference.std is None else f"{difference.std:.4f}",
                    f"{difference.better} of {difference.pairs}",
                    "no test" if difference.p is None else f"{difference.p:.2g}",
                ]
            )
        head = ["difference over seeds", "mean", "deviation", "above 0", "p (paired t, two sides)"]
        parts.append(_table(head, rows))
    return "\n\n".join(parts)


def write_section(document: Path, name: str, text: str) -> None:
    """Put a text between a document's markers `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ConfigError: the document has not exactly one such place.
    """
    whole, begin, end = _marked(document, name)
    before, _, rest = whole.partition(begin)
    _, _, after = rest.partition(end)
    draft = document.with_name(f".{document.name}.tmp")
    draft.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    draft.replace(document)


def check_section(document: Path, name: str) -> None:
    """Refuse a document that `write_section` could not write to. Raises ConfigError."""
    _marked(document, name)


def _marked(document: Path, name: str) -> tuple[str, str, str]:
    """A document's text and its two markers."""
    if not document.is_file():
        raise ConfigError(f"there is no document {document}; correct the path")
    whole = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ConfigError(f"{document} must have one line {begin} and, below it, one {end}")
    return whole, begin, end


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
