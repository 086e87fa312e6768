"""The rows of question answering: read, and every answer looked up in its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table
from trainer.finetune.texts import check_texts


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A split; each row's answers are (text, character of the context where it begins)."""

    table: Table
    questions: list[str]
    contexts: list[str]
    answers: list[list[tuple[str, int]]]

    def answer(self, row: int) -> tuple[int, int]:
        """What is learned: the first answer's characters, without the space around it."""
        text, start = self.answers[row][0]
        start += len(text) - len(text.lstrip())
        return start, start + len(text.strip())


def read_questions(settings: TaskSettings, table: Table, packed: bool) -> Questions:
    """Check a split.

    Args:
        packed: answers are in one column, as SQuAD has them, rather than in two.

    Raises:
        TaskDataError: names file, row and column.
    """
    contexts = check_texts(table, settings.context, "task.context")
    questions = check_texts(table, settings.question, "task.question")
    if packed:
        column = settings.answers
        values = [_unpacked(v) for v in table.column(column, "task.answers")]
    else:
        column = settings.answer_text
        texts = table.column(column, "task.answer_text")
        starts = table.column(settings.answer_start, "task.answer_start")
        values = [(_listed(t), _listed(s)) for t, s in zip(texts, starts, strict=True)]
    answers = [
        _checked(table, row, column, found, contexts[row]) for row, found in enumerate(values)
    ]
    return Questions(table=table, questions=questions, contexts=contexts, answers=answers)


def _unpacked(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, dict):
        return None, None
    return value.get("text"), value.get("answer_start")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _checked(
    table: Table, row: int, column: str, found: tuple[Any, Any], context: str
) -> list[tuple[str, int]]:
    texts, starts = found
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise table.fault(
            row, column, 'it must be {"text": [...], "answer_start": [...]}, lists of one length'
        )
    if not texts:
        raise table.fault(row, column, "there is no answer; leave unanswerable questions out")
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if isinstance(start, str) and start.strip().isdecimal():  # CSV has no numbers
            start = int(start)
        if not isinstance(text, str) or not text.strip():
            raise table.fault(row, column, f"{text!r:.40}; an answer must be text")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise table.fault(
                row,
                column,
                f"it begins at {start!r:.40}; that must be a character's number, from 0",
            )
        given = context[start : start + len(text)]
        if given != text:
            place = context.find(text)
            hint = f"it is at {place}" if place >= 0 else "it is nowhere in the context"
            raise table.fault(
                row,
                column,
                f"the answer {text!r:.60} is not in the context at character {start}, where "
                f"{given!r:.60} stands; {hint}",
            )
        answers.append((text, start))
    return answers
