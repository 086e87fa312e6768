"""Regression: one number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from trainer.finetune.encoded import EncodedRows
from trainer.finetune.heads import FloatArray, Prediction, row_ids
from trainer.finetune.measures import correlations
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table
from trainer.finetune.texts import Texts, encode_texts, pair_column, read_texts


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A `Head` (see there)."""

    settings: TaskSettings
    texts: Mapping[str, Texts]
    gold: Mapping[str, list[float]]

    auto_class = "AutoModelForSequenceClassification"
    target_names = ("labels",)

    @classmethod
    def read(cls, settings: TaskSettings, tables: Mapping[str, Table]) -> Regression:
        """Check texts and numbers of every split.

        Raises:
            TaskDataError: names file, row and column.
        """
        pair = pair_column(settings, tables["train"])
        return cls(
            settings=settings,
            texts={split: read_texts(settings, table, pair) for split, table in tables.items()},
            gold={split: _numbers(table, settings.label) for split, table in tables.items()},
        )

    def model_options(self) -> dict[str, Any]:
        return {
            "num_labels": 1,
            "id2label": {0: "score"},
            "label2id": {"score": 0},
            "problem_type": "regression",
        }

    def describe(self) -> str:
        rows = ", ".join(f"{len(gold):,} {split}" for split, gold in self.gold.items())
        what = "pairs of texts" if self.texts["train"].pair_column else "texts"
        return f"regression over {what}; rows: {rows}"

    def encode(self, split: str, tokenizer: Any) -> EncodedRows:
        return encode_texts(
            self.texts[split],
            tokenizer,
            max_length=self.settings.max_length,
            targets=pa.array(self.gold[split], pa.float32()),
        )

    def predictions(self, split: str, encoded: EncodedRows, logits: FloatArray) -> list[Prediction]:
        ids = row_ids(self.texts[split].table, self.settings.id)
        rows = zip(ids, self.gold[split], logits.reshape(-1).tolist(), strict=True)
        return [
            Prediction(id=name, gold=gold, predicted=predicted, probabilities=None)
            for name, gold, predicted in rows
        ]

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        return correlations([p.predicted for p in predictions], [p.gold for p in predictions])


def _numbers(table: Table, column: str) -> list[float]:
    found = []
    for row, value in enumerate(table.column(column, "task.label")):
        try:
            # Text, because CSV has nothing else; True is a number to Python, but none here.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            shown = "no value" if value is None else repr(value)
            raise table.fault(row, column, f"{shown:.40}; it must be a finite number")
        found.append(number)
    return found
