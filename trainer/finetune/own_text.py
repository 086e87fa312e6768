"""What a row's own text is: which rows say the same, and which entries of a memory are a row's."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from trainer.finetune.heads import SPLITS
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table, read_table
from trainer.finetune.texts import pair_column

# Documents of samples are numbered from here, far above those that a corpus or an edit numbers,
# and below the largest id that a row may give (`cluster.editing.passages.LARGEST_GIVEN_ID`).
FIRST_SAMPLE_DOC_ID = 2**62
_SAMPLE_DOC_IDS = 2**61


def normalised(text: str) -> str:
    """A text without what does not make it another: case, width and kind of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def sample_doc_id(texts: Sequence[str]) -> int:
    """The document's id of a sample: the same for the same texts after `normalised`, whatever the
    file or the row.

    Args:
        texts: of one row, in order.
    """
    # White space is normalised, so no text holds the separator.
    told = "\n".join(normalised(text) for text in texts).encode()
    return FIRST_SAMPLE_DOC_ID + int.from_bytes(sha256(told).digest()[:8]) % _SAMPLE_DOC_IDS


def text_columns(settings: TaskSettings, train: Table) -> tuple[str, ...]:
    """The columns that a row's text is read from, labels apart."""
    if settings.kind == "token_classification":
        return (settings.tokens,)
    if settings.kind == "question_answering":
        return (settings.question, settings.context)
    pair = pair_column(settings, train)
    return (settings.text, pair) if pair else (settings.text,)


def row_doc_ids(table: Table, columns: Sequence[str]) -> list[int]:
    """Each row's `sample_doc_id`; the table was read and checked by the task's head."""
    return [
        sample_doc_id([_told(table.columns[column][row]) for column in columns])
        for row in range(len(table))
    ]


def split_doc_ids(settings: TaskSettings) -> dict[str, list[int]]:
    """The rows' `sample_doc_id` of every split that the settings name, in the files' order.

    The task was read and checked before. Raises as `read_table`.
    """
    tables = {
        split: read_table(path, f"task.{split}")
        for split in SPLITS
        for path in [getattr(settings, split)]
        if path.strip()
    }
    if settings.train_rows:
        tables["train"] = tables["train"].first(settings.train_rows)
    columns = text_columns(settings, tables["train"])
    return {split: row_doc_ids(table, columns) for split, table in tables.items()}


def rows_seen_in_training(settings: TaskSettings) -> dict[str, list[bool]]:
    """For dev and test, where it is given: whether a row's text is a training row's as well."""
    found = split_doc_ids(settings)
    learned = set(found["train"])
    return {
        split: [doc_id in learned for doc_id in doc_ids]
        for split, doc_ids in found.items()
        if split != "train"
    }


def _told(value: Any) -> str:
    """A value as one text; a list of words, or a list as CSV holds it, is a text as well."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
