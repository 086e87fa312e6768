"""Extractive question answering: the part of a context that answers a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.finetune.answers import NO_CONTEXT, best_of, best_span
from trainer.finetune.encoded import TOKENIZE_ROWS, EncodedRows, int_lists
from trainer.finetune.heads import FloatArray, Prediction, row_ids
from trainer.finetune.measures import answer_scores
from trainer.finetune.questions import Questions, read_questions
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table

KEPT = ("question", "first", "behind")
CONTEXT = 1  # the second sequence of a pair


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """A `Head` (see there).

    A context longer than a sequence is cut into windows that overlap by `doc_stride` tokens. A
    window that does not hold the whole answer teaches position 0, where no answer begins.
    """

    settings: TaskSettings
    rows: Mapping[str, Questions]

    auto_class = "AutoModelForQuestionAnswering"
    target_names = ("start_positions", "end_positions")

    @classmethod
    def read(cls, settings: TaskSettings, tables: Mapping[str, Table]) -> QuestionAnswering:
        """Check questions, contexts and answers of every split.

        Raises:
            TaskDataError: names file, row and column.
        """
        packed = settings.answers in tables["train"].columns
        rows = {split: read_questions(settings, t, packed) for split, t in tables.items()}
        return cls(settings=settings, rows=rows)

    def model_options(self) -> dict[str, Any]:
        return {}

    def describe(self) -> str:
        rows = ", ".join(f"{len(part.questions):,} {split}" for split, part in self.rows.items())
        return f"extractive question answering; questions: {rows}"

    def encode(self, split: str, tokenizer: Any) -> EncodedRows:
        part = self.rows[split]
        self._check_lengths(part, tokenizer)
        names = [n for n in ("input_ids", "token_type_ids") if n in tokenizer.model_input_names]
        lists: dict[str, list[Any]] = {name: [] for name in (*names, "first", "behind")}
        numbers: dict[str, list[int]] = {n: [] for n in (*self.target_names, "question")}
        for start in range(0, len(part.questions), TOKENIZE_ROWS):
            block = slice(start, start + TOKENIZE_ROWS)
            encoded = tokenizer(
                part.questions[block],
                part.contexts[block],
                truncation="only_second",
                max_length=self.settings.max_length,
                stride=self.settings.doc_stride,
                return_overflowing_tokens=True,
                verbose=False,
            )
            for window, encoding in enumerate(encoded.encodings):
                row = start + encoded["overflow_to_sample_mapping"][window]
                first_T, behind_T = _context_characters(encoding)
                begin, end = _positions(first_T, behind_T, *part.answer(row))
                numbers["start_positions"].append(begin)
                numbers["end_positions"].append(end)
                numbers["question"].append(row)
                lists["first"].append(first_T)
                lists["behind"].append(behind_T)
            for name in names:
                lists[name] += encoded[name]
        columns = {name: int_lists(rows) for name, rows in lists.items()}
        columns |= {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
        return EncodedRows(columns, cut=0, kept=KEPT)

    def predictions(
        self, split: str, encoded: EncodedRows, logits: tuple[FloatArray, FloatArray]
    ) -> list[Prediction]:
        part = self.rows[split]
        windows: list[list[Any]] = [[] for _ in part.questions]
        for window in range(len(encoded)):
            first_T, behind_T = encoded.kept("first", window), encoded.kept("behind", window)
            if not (first_T != NO_CONTEXT).any():
                continue
            length = len(first_T)
            windows[int(encoded.kept("question", window))].append(
                best_span(
                    logits[0][window, :length],
                    logits[1][window, :length],
                    first_T,
                    behind_T,
                    self.settings.max_answer_tokens,
                )
            )
        found = []
        for row, name in enumerate(row_ids(part.table, self.settings.id)):
            best, share = best_of(windows[row])
            found.append(
                Prediction(
                    id=name,
                    gold=[text for text, _ in part.answers[row]],
                    predicted=part.contexts[row][best.start : best.end],
                    probabilities=share,
                )
            )
        return found

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        return answer_scores([p.predicted for p in predictions], [p.gold for p in predictions])

    def _check_lengths(self, part: Questions, tokenizer: Any) -> None:
        """Refuse rows without tokens, and questions that leave no room for a window to move."""
        limit, stride = self.settings.max_length, self.settings.doc_stride
        special = tokenizer.num_special_tokens_to_add(pair=True)
        for column, texts in (
            (self.settings.question, part.questions),
            (self.settings.context, part.contexts),
        ):
            for start in range(0, len(texts), TOKENIZE_ROWS):
                block = texts[start : start + TOKENIZE_ROWS]
                encoded = tokenizer(block, add_special_tokens=False, verbose=False)
                for row, ids in enumerate(encoded["input_ids"], start):
                    if not ids:
                        raise part.table.fault(row, column, "the text has no tokens")
                    if column == self.settings.question and limit - special - len(ids) <= stride:
                        raise part.table.fault(
                            row,
                            column,
                            f"the question has {len(ids)} tokens, which leaves "
                            f"{max(limit - special - len(ids), 0)} of task.max_length = {limit} "
                            f"for the context; that must be more than task.doc_stride = {stride}",
                        )


def _context_characters(encoding: Any) -> tuple[list[int], list[int]]:
    """Each token's first character in the context and the one behind its last; -1 for others."""
    pairs = [
        offsets if part == CONTEXT else (NO_CONTEXT, NO_CONTEXT)
        for offsets, part in zip(encoding.offsets, encoding.sequence_ids, strict=True)
    ]
    return [first for first, _ in pairs], [behind for _, behind in pairs]


def _positions(
    first_T: list[int], behind_T: list[int], answer_start: int, answer_end: int
) -> tuple[int, int]:
    """The tokens that hold the answer's first and last character; (0, 0) where one is not here."""
    first, behind = np.array(first_T), np.array(behind_T)
    here = first != NO_CONTEXT
    (begins,) = np.nonzero(here & (first <= answer_start) & (behind > answer_start))
    (ends,) = np.nonzero(here & (first < answer_end) & (behind >= answer_end))
    if not len(begins) or not len(ends):
        return 0, 0
    return int(begins[0]), int(ends[0])
