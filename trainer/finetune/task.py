"""From a task's settings to its head, with every file read and checked."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

from trainer.finetune.classification import Classification
from trainer.finetune.errors import TaskDataError
from trainer.finetune.heads import SPLITS, Head
from trainer.finetune.question_answering import QuestionAnswering
from trainer.finetune.regression import Regression
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import read_table
from trainer.finetune.token_classification import TokenClassification

_HEADS: dict[str, Any] = {
    "classification": Classification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
}


def read_task(settings: TaskSettings) -> Head:
    """Read and check train, dev and, where it is given, test.

    Raises:
        TaskDataError, CorpusError: names file, row and column of the first fault.
    """
    paths = {split: getattr(settings, split) for split in SPLITS}
    tables = {
        split: read_table(path, f"task.{split}") for split, path in paths.items() if path.strip()
    }
    if settings.train_rows:
        tables["train"] = tables["train"].first(settings.train_rows)
    head: Head = _HEADS[settings.kind].read(settings, tables)
    return head


def splits_of(settings: TaskSettings) -> tuple[str, ...]:
    """The splits that the settings name."""
    return tuple(split for split in SPLITS if getattr(settings, split).strip())


def refuse_measuring_on_train(settings: TaskSettings) -> None:
    """Check that no split that is measured is the file that is learned from.

    Raises:
        TaskDataError: dev or test is that very file, or a copy of it.
    """
    train = Path(settings.train).expanduser()
    for split in splits_of(settings):
        path = Path(getattr(settings, split)).expanduser()
        if split != "train" and filecmp.cmp(train, path, shallow=False):
            raise TaskDataError(
                f"task.{split} = {str(path)!r}: holds the same rows as task.train = "
                f"{str(train)!r}; give rows that are not trained on, or its scores say nothing"
            )
