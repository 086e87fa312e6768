"""Token classification: a tag for every word of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.finetune.encoded import IGNORED, TOKENIZE_ROWS, EncodedRows, int_lists
from trainer.finetune.errors import TaskDataError
from trainer.finetune.heads import FloatArray, Prediction, row_ids, softmax
from trainer.finetune.labels import in_order, label_name, unseen
from trainer.finetune.measures import class_scores
from trainer.finetune.settings import TaskSettings
from trainer.finetune.spans import is_bio, span_scores
from trainer.finetune.tables import Table


@dataclass(frozen=True, kw_only=True)
class TaggedWords:
    """The rows of a split: as many tags, by index, as words."""

    table: Table
    words: list[list[str]]
    tags: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class TokenClassification:
    """A `Head` (see there).

    A word's tag is learned and read at its first token. Words behind `max_length`, and words
    without any token, are neither learned nor scored; the rows that hold such count as cut.
    """

    settings: TaskSettings
    rows: Mapping[str, TaggedWords]
    labels: tuple[str, ...]

    auto_class = "AutoModelForTokenClassification"
    target_names = ("labels",)

    @classmethod
    def read(cls, settings: TaskSettings, tables: Mapping[str, Table]) -> TokenClassification:
        """Check words and tags of every split.

        Raises:
            TaskDataError: names file, row and column.
        """
        words = {s: _words(t, settings.tokens) for s, t in tables.items()}
        names = {s: _tag_names(t, settings.tags, words[s]) for s, t in tables.items()}
        labels = in_order({name for row in names["train"] for name in row})
        index = {name: i for i, name in enumerate(labels)}
        for split, table in tables.items():
            for number, row in enumerate(names[split]):
                for name in row:
                    if name not in index:
                        raise table.fault(number, settings.tags, unseen(name, labels))
        if settings.deciding_metric.startswith("span_") and not is_bio(labels):
            raise TaskDataError(
                f"{tables['train'].path}, column {settings.tags!r}: the tags are not BIO (O, "
                'B-..., I-...), so there are no spans; set task.metric = "f1_macro" or "accuracy". '
                f"They are {', '.join(labels[:8])}{', …' if labels[8:] else ''}"
            )
        rows = {
            split: TaggedWords(
                table=table,
                words=words[split],
                tags=[[index[name] for name in row] for row in names[split]],
            )
            for split, table in tables.items()
        }
        return cls(settings=settings, rows=rows, labels=labels)

    def model_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    def describe(self) -> str:
        rows = ", ".join(f"{len(part.words):,} {split}" for split, part in self.rows.items())
        return f"classification of words into {len(self.labels)} tags; rows: {rows}"

    def encode(self, split: str, tokenizer: Any) -> EncodedRows:
        part = self.rows[split]
        names = [n for n in ("input_ids", "token_type_ids") if n in tokenizer.model_input_names]
        columns: dict[str, list[list[int]]] = {name: [] for name in (*names, "labels", "words")}
        cut = left_out = 0
        for start in range(0, len(part.words), TOKENIZE_ROWS):
            encoded = tokenizer(
                part.words[start : start + TOKENIZE_ROWS],
                is_split_into_words=True,
                truncation=True,
                max_length=self.settings.max_length,
                verbose=False,
            )
            for row, encoding in enumerate(encoded.encodings, start):
                firsts = _first_tokens(encoding.word_ids)
                if not any(word >= 0 for word in firsts):
                    raise part.table.fault(row, self.settings.tokens, "the words have no tokens")
                tags = part.tags[row]
                columns["labels"].append([tags[w] if w >= 0 else IGNORED for w in firsts])
                columns["words"].append(firsts)
                missing = len(tags) - sum(word >= 0 for word in firsts)
                cut += missing > 0
                left_out += missing
            for name in names:
                columns[name] += encoded[name]
        arrays = {name: int_lists(rows) for name, rows in columns.items()}
        return EncodedRows(arrays, cut=cut, kept=("words",), words_left_out=left_out)

    def predictions(self, split: str, encoded: EncodedRows, logits: FloatArray) -> list[Prediction]:
        part = self.rows[split]
        found = []
        for row, name in enumerate(row_ids(part.table, self.settings.id)):
            firsts_T = encoded.kept("words", row)
            (places,) = np.nonzero(firsts_T >= 0)
            shares = softmax(logits[row, places])
            tags = part.tags[row]
            found.append(
                Prediction(
                    id=name,
                    gold=[self.labels[tags[word]] for word in firsts_T[places]],
                    predicted=[self.labels[i] for i in shares.argmax(-1)],
                    # Of the predicted tags only: all of them would be most of the file.
                    probabilities=[float(share) for share in shares.max(-1)],
                )
            )
        return found

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        index = {name: i for i, name in enumerate(self.labels)}
        found = class_scores(
            [index[tag] for p in predictions for tag in p.predicted],
            [index[tag] for p in predictions for tag in p.gold],
            max(len(self.labels), 2),
        )
        del found["matthews"]
        if not is_bio(self.labels):
            return found
        spans = span_scores([p.predicted for p in predictions], [p.gold for p in predictions])
        return spans | found


def _first_tokens(word_ids: list[int | None]) -> list[int]:
    """For each token the word that it begins; -1 for others."""
    return [
        -1 if word is None or (place and word_ids[place - 1] == word) else word
        for place, word in enumerate(word_ids)
    ]


def _lists(table: Table, column: str, setting: str) -> list[list[Any]]:
    found = []
    for row, value in enumerate(table.column(column, setting)):
        if isinstance(value, str):  # CSV has no lists
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, list) or not value:
            raise table.fault(
                row, column, 'it must be a list that is not empty; in CSV as JSON: ["a", "b"]'
            )
        found.append(value)
    return found


def _words(table: Table, column: str) -> list[list[str]]:
    rows = _lists(table, column, "task.tokens")
    for row, words in enumerate(rows):
        for word in words:
            if not isinstance(word, str):
                raise table.fault(row, column, f"{word!r:.40}; every word must be text")
    return rows


def _tag_names(table: Table, column: str, words: list[list[str]]) -> list[list[str]]:
    rows = _lists(table, column, "task.tags")
    for row, tags in enumerate(rows):
        if len(tags) != len(words[row]):
            raise table.fault(row, column, f"{len(tags)} tags for {len(words[row])} words")
    return [[label_name(table, column, row, tag) for tag in tags] for row, tags in enumerate(rows)]
