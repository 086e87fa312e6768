"""Metrics by torchmetrics, as plain numbers: from 0 to 1, correlations from -1 to 1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch


def class_scores(predicted: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of one label per row.

    Macro F1 is the mean over the classes that occur, predicted or gold; a correlation that is not
    defined, because one side names one class only, is 0.
    """
    from torchmetrics.functional import classification as measure

    predicted_N, gold_N = torch.tensor(predicted), torch.tensor(gold)
    found = {
        "accuracy": measure.multiclass_accuracy(predicted_N, gold_N, classes, average="micro"),
        "f1_micro": measure.multiclass_f1_score(predicted_N, gold_N, classes, average="micro"),
        "f1_macro": measure.multiclass_f1_score(predicted_N, gold_N, classes, average="macro"),
        "matthews": measure.multiclass_matthews_corrcoef(predicted_N, gold_N, classes),
    }
    scores = {name: float(value) for name, value in found.items()}
    if len(set(predicted)) == 1 or len(set(gold)) == 1:
        # For two classes torchmetrics gives a limit instead, which is far from 0.
        scores["matthews"] = 0.0
    return scores


def correlations(predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant, or has one row."""
    from torchmetrics.functional import regression as measure

    predicted_N = torch.tensor(predicted, dtype=torch.float64)
    gold_N = torch.tensor(gold, dtype=torch.float64)
    if len(gold) < 2 or not len(predicted_N.unique()) > 1 or not len(gold_N.unique()) > 1:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        # Its threshold for "close to zero" is met by a model that has hardly learned yet.
        warnings.filterwarnings("ignore", message="The variance of predictions or target")
        pearson = float(measure.pearson_corrcoef(predicted_N, gold_N).nan_to_num(0.0))
    return {
        "pearson": pearson,
        "spearman": float(measure.spearman_corrcoef(predicted_N, gold_N)),
    }


def answer_scores(predicted: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's F1 and exact match, the best over a question's answers."""
    from torchmetrics.functional.text import squad

    found = squad(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)],
        [
            {"id": str(i), "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}
            for i, texts in enumerate(gold)
        ],
    )
    return {name: float(found[name]) / 100 for name in ("f1", "exact_match")}
