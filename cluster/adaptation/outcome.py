"""A comparison's numbers: every condition's scores, and its differences with paired tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.adaptation.conditions import Condition
from cluster.cli.text import table
from trainer.finetune.heads import Head, Prediction
from trainer.finetune.paired import paired_difference
from trainer.finetune.results import MEASURED, summary
from trainer.finetune.seed_run import PREDICTIONS, rounded, seed_directory
from trainer.finetune.task import read_task

UNSEEN = "unseen"
"""What is measured on rows whose text is not in the training file too."""


def outcome(
    conditions: Sequence[Condition],
    finished: Mapping[str, dict[str, Any]],
    *,
    references: Sequence[str],
    notes: Mapping[str, str],
    seen: Mapping[str, Sequence[bool]],
) -> dict[str, Any]:
    """What comparison.json holds.

    Args:
        conditions: all that are to be compared.
        finished: the results.json of those that are finished, by name.
        references: conditions that the others are measured against.
        notes: condition to what a reader must know of it.
        seen: split to whether each row's text is a training row's as well.

    Returns:
        `conditions` (values per seed, means, deviations), `differences` (paired by seed; of every
        metric of what is reported), `leaks` (rows whose text was trained on, by split), and what
        was compared.
    """
    task = conditions[0].config.task
    reported = "test" if task.test.strip() else "dev"
    kept = [not leaked for leaked in seen[reported]]
    # Without a leaked row the scores are the same; without others there is nothing to score.
    head = read_task(task) if any(kept) and not all(kept) else None
    rows: list[dict[str, Any]] = []
    for condition in conditions:
        if condition.name not in finished:
            continue
        results = finished[condition.name]
        home, records = Path(condition.config.run.dir), results["seeds"]
        scores = {
            name: [record[name] for record in records] for name in MEASURED if name in records[0]
        }
        summed = results["summary"]
        if head is not None:
            unseen = [
                _scores_of(head, seed_directory(home, record["seed"]) / PREDICTIONS, kept)
                for record in records
            ]
            scores[f"{reported}_{UNSEEN}"] = unseen
            summed = summed | _summed(f"{reported}_{UNSEEN}", unseen)
        rows.append(
            {
                "name": condition.name,
                "what": condition.what,
                "directory": str(home),
                "model": results["model"],
                "memory": results["memory"],
                "note": "; ".join(n for n in (results["note"], notes.get(condition.name)) if n),
                "summary": summed,
                "scores": scores,
            }
        )
    return {
        "task": task.kind,
        "metric": task.deciding_metric,
        "reported": reported,
        "seeds": list(conditions[0].config.train.seeds),
        "leaks": {
            split: {"rows": len(leaked), "seen_in_training": sum(leaked)}
            for split, leaked in seen.items()
        },
        "conditions": rows,
        "differences": _differences(rows, references, [reported, f"{reported}_{UNSEEN}"]),
        "unfinished": [c.name for c in conditions if c.name not in finished],
    }


def outcome_text(found: Mapping[str, Any], references: Sequence[str]) -> str:
    """The deciding metric of every condition for a terminal, with differences and leaks."""
    metric, reported = found["metric"], found["reported"]
    unseen = f"{reported}_{UNSEEN}"
    has_unseen = any(unseen in row["summary"] for row in found["conditions"])
    measured = [reported, *([unseen] if has_unseen else [])]
    against = [name for name in references if any(r["name"] == name for r in found["conditions"])]
    head = [f"{metric}, {len(found['seeds'])} seeds"]
    head += [reported, *([f"{reported}, unseen rows"] if has_unseen else [])]
    decided = measured[-1]
    head += [f"- {name}" for name in against]
    lines = []
    for row in found["conditions"]:
        cells = [row["name"], *(_mean(row["summary"][name][metric]) for name in measured)]
        cells += [
            _difference_text(found["differences"], row["name"], name, decided, metric)
            for name in against
        ]
        lines.append(cells)
    told = [table(head, lines, most=[40] * len(head), right=range(1, len(head)))]
    told += _footnotes(found, reported, has_unseen)
    return "\n".join(told)


def _footnotes(found: Mapping[str, Any], reported: str, has_unseen: bool) -> list[str]:
    pairs = len(found["seeds"])
    told = [
        "differences: mean ± deviation over the seeds, and p of a paired t-test of two sides with "
        f"{pairs - 1} degrees of freedom" + (", on the unseen rows" if has_unseen else "")
        if pairs > 1
        else "differences: of one seed, which is no test; give several in train.seeds"
    ]
    told += [
        f"{counts['seen_in_training']:,} of {counts['rows']:,} {split} rows have the text of a "
        "training row"
        + ("; unseen rows are the others" if split == reported and has_unseen else "")
        for split, counts in found["leaks"].items()
        if counts["seen_in_training"]
    ]
    told += [f"{row['name']}: {row['note']}" for row in found["conditions"] if row["note"]]
    return told


def _differences(
    rows: Sequence[Mapping[str, Any]], references: Sequence[str], measured: Sequence[str]
) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in rows}
    found = []
    for reference in references:
        for row in rows:
            if reference not in by_name or row["name"] == reference:
                continue
            for name in measured:
                mine, theirs = row["scores"].get(name), by_name[reference]["scores"].get(name)
                if mine is None or theirs is None:
                    continue
                for metric in mine[0]:
                    difference = paired_difference(
                        [scores[metric] for scores in mine], [scores[metric] for scores in theirs]
                    )
                    found.append(
                        {
                            "condition": row["name"],
                            "against": reference,
                            "measured": name,
                            "metric": metric,
                            **{key: _short(value) for key, value in asdict(difference).items()},
                        }
                    )
    return found


def _scores_of(head: Head, path: Path, kept: Sequence[bool]) -> dict[str, float]:
    """The scores of the rows that are kept, from the predictions that a seed wrote."""
    with path.open(encoding="utf-8") as lines:
        predictions = [
            Prediction(**json.loads(line)) for line, keep in zip(lines, kept, strict=True) if keep
        ]
    return rounded(head.scores(predictions))


def _summed(name: str, scores: list[dict[str, float]]) -> dict[str, Any]:
    """The summary of one thing that was measured, as results.json has it of others."""
    summed = summary([{"test": row} for row in scores])
    return {name: summed["test"]}


def _difference_text(
    differences: Sequence[Mapping[str, Any]], name: str, against: str, measured: str, metric: str
) -> str:
    for found in differences:
        place = (found["condition"], found["against"], found["measured"], found["metric"])
        if place == (name, against, measured, metric):
            spread = "" if found["std"] is None else f" ± {found['std']:.4f}"
            p = "" if found["p"] is None else f" (p {found['p']:.3f})"
            return f"{found['mean']:+.4f}{spread}{p}"
    return ""


def _mean(found: Mapping[str, Any]) -> str:
    mean = f"{found['mean']:.4f}"
    return mean if found["std"] is None else f"{mean} ± {found['std']:.4f}"


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else round(value, 9)
