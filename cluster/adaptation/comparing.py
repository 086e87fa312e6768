"""Conditions that are fine-tuned over the same seeds: checked all first, resumable, summed up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.adaptation.conditions import Condition
from cluster.adaptation.outcome import outcome
from cluster.errors import LaunchError
from cluster.finetune import check_finetuning, run_finetuning
from cluster.run_lock import run_lock
from trainer.export import write_json, write_text
from trainer.finetune.own_text import rows_seen_in_training
from trainer.finetune.run import claim
from trainer.settings_fields import ConfigError

RESULTS = "comparison.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        home: receives one directory per condition, the results and the settings.
        conditions: at least one; all with the same task and the same seeds.
        references: names of conditions that the others are measured against.
        settings: file name to content, kept beside the results.
        notes: condition to what a reader must know of it.
    """

    home: Path
    conditions: Sequence[Condition]
    references: Sequence[str]
    settings: dict[str, str]
    notes: dict[str, str]


def check_comparison(comparison: Comparison, *, say: Say) -> None:
    """Read and check every condition, and train nothing.

    Raises:
        LaunchError: started by torchrun. Else as `trainer.finetune.run.check`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError(
            "a comparison runs in one process; start it without torchrun, or fine-tune each "
            "condition with `pluglm finetune` under torchrun"
        )
    for condition in comparison.conditions:
        say(f"{condition.name}: {condition.what}")
        check_finetuning(condition.config, say=say)
    for split, seen in rows_seen_in_training(comparison.conditions[0].config.task).items():
        if any(seen):
            say(f"{sum(seen):,} of {len(seen):,} {split} rows have the text of a training row")


def run_comparison(
    comparison: Comparison,
    *,
    resume: bool,
    say: Say,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Fine-tune every condition and seed that is not finished; blocks.

    `comparison.json` is written after each condition, with what is finished by then.

    Args:
        comparison: what `check_comparison` found to fit.
        resume: go on in a directory that holds finished seeds, which are not trained again.
        say: told what is going on.
        prepare: makes what the conditions read, before any of them begins.

    Returns:
        What comparison.json holds (see `outcome`).

    Raises:
        ConfigError: there are finished seeds and `resume` is not set, or they are of other settings
            or files. LaunchError: another process works there. TrainingError: a seed diverged.
    """
    home = comparison.home
    with run_lock(home):
        if not resume:
            _refuse_finished(comparison)
        prepare()
        for condition in comparison.conditions:
            # Before anything is trained: what is finished must be of these very conditions.
            claim(condition.config, resume=True)
        for name, text in comparison.settings.items():
            write_text(home / name, text)
        seen = rows_seen_in_training(comparison.conditions[0].config.task)
        found: dict[str, Any] = {}
        finished: dict[str, dict[str, Any]] = {}
        for number, condition in enumerate(comparison.conditions, start=1):
            say(f"condition {number} of {len(comparison.conditions)}: {condition.name}")
            results = run_finetuning(condition.config, resume=True, say=say)
            assert results is not None, "there is one process"
            finished[condition.name] = results
            found = outcome(
                comparison.conditions,
                finished,
                references=comparison.references,
                notes=comparison.notes,
                seen=seen,
            )
            write_json(home / RESULTS, found)
    return found


def _refuse_finished(comparison: Comparison) -> None:
    homes = [Path(condition.config.run.dir) for condition in comparison.conditions]
    if any(any(home.glob("seed-*")) for home in homes):
        raise ConfigError(
            f"run.dir = {str(comparison.home)!r}: holds finished seeds already; go on with "
            "--resume, or choose another directory with --out DIR"
        )
