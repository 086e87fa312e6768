"""Sequence classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from trainer.finetune.encoded import EncodedRows
from trainer.finetune.heads import FloatArray, Prediction, row_ids, softmax
from trainer.finetune.labels import label_indices, label_names
from trainer.finetune.measures import class_scores
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table
from trainer.finetune.texts import Texts, encode_texts, pair_column, read_texts


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A `Head` (see there). Labels are those of the training file, in order."""

    settings: TaskSettings
    texts: Mapping[str, Texts]
    labels: tuple[str, ...]
    gold: Mapping[str, list[int]]

    auto_class = "AutoModelForSequenceClassification"
    target_names = ("labels",)

    @classmethod
    def read(cls, settings: TaskSettings, tables: Mapping[str, Table]) -> Classification:
        """Check texts and labels of every split.

        Raises:
            TaskDataError: names file, row and column.
        """
        pair = pair_column(settings, tables["train"])
        texts = {split: read_texts(settings, table, pair) for split, table in tables.items()}
        columns = {s: t.column(settings.label, "task.label") for s, t in tables.items()}
        labels = label_names(tables["train"], settings.label, columns["train"])
        gold = {
            split: label_indices(table, settings.label, columns[split], labels)
            for split, table in tables.items()
        }
        return cls(settings=settings, texts=texts, labels=labels, gold=gold)

    def model_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def describe(self) -> str:
        rows = ", ".join(f"{len(gold):,} {split}" for split, gold in self.gold.items())
        what = "pairs of texts" if self.texts["train"].pair_column else "texts"
        told = f"classification of {what} into {len(self.labels)} labels; rows: {rows}"
        for split, gold in self.gold.items():
            there = set(gold)
            absent = [name for i, name in enumerate(self.labels) if i not in there]
            if absent:
                told += f"; {split} has none of {', '.join(map(repr, absent))}"
        return told

    def encode(self, split: str, tokenizer: Any) -> EncodedRows:
        return encode_texts(
            self.texts[split],
            tokenizer,
            max_length=self.settings.max_length,
            targets=pa.array(self.gold[split], pa.int64()),
        )

    def predictions(self, split: str, encoded: EncodedRows, logits: FloatArray) -> list[Prediction]:
        ids = row_ids(self.texts[split].table, self.settings.id)
        rows = zip(ids, self.gold[split], softmax(logits).tolist(), strict=True)
        return [
            Prediction(
                id=name,
                gold=self.labels[gold],
                predicted=self.labels[max(range(len(shares)), key=shares.__getitem__)],
                probabilities=dict(zip(self.labels, shares, strict=True)),
            )
            for name, gold, shares in rows
        ]

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        return class_scores(
            [self.labels.index(p.predicted) for p in predictions],
            [self.labels.index(p.gold) for p in predictions],
            len(self.labels),
        )
