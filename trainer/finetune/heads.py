"""What the kinds of tasks have in common: a head, its inputs, its predictions, its measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.finetune.encoded import EncodedRows
from trainer.finetune.tables import Table

FloatArray = npt.NDArray[np.float32]
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row's answer.

    Attributes:
        id: the row's own id, or its number from 1.
        gold: what the file says.
        predicted: what the model says, of the same type.
        probabilities: of what was predicted and of its rivals; None where there are none.
    """

    id: str
    gold: Any
    predicted: Any
    probabilities: Any


class Head(Protocol):
    """One kind of task over its splits, each read and checked whole.

    The splits are those that the settings name: train, dev and, if given, test.
    """

    @property
    def auto_class(self) -> str:
        """The class of `transformers` that loads a model with this head."""

    @property
    def target_names(self) -> tuple[str, ...]:
        """The model's arguments that hold what is to be predicted."""

    def model_options(self) -> dict[str, Any]:
        """What the head adds to a model's configuration."""

    def describe(self) -> str:
        """One line: the number of rows, and of labels where there are any."""

    def encode(self, split: str, tokenizer: Any) -> EncodedRows:
        """Tokenise a split.

        Raises:
            TaskDataError: a row without tokens, or that cannot fit; names it.
        """

    def predictions(self, split: str, encoded: EncodedRows, logits: Any) -> list[Prediction]:
        """What the logits of a split's encoded rows mean, a prediction per row of the file."""

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        """Every metric of this kind, from 0 to 1 (correlations from -1)."""


def row_ids(table: Table, column: str) -> list[str]:
    """The rows' own ids where there is such a column, else their numbers from 1."""
    if column in table.columns:
        return [str(value) for value in table.columns[column]]
    return [str(row + 1) for row in range(len(table))]


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    share: FloatArray = powers / powers.sum(-1, keepdims=True)
    return share
