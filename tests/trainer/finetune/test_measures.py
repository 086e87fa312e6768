"""Metrics against numbers that were counted by hand."""

import math

import numpy as np
import pytest

from trainer.finetune.answers import best_of, best_span
from trainer.finetune.measures import answer_scores, class_scores, correlations
from trainer.finetune.results import summary
from trainer.finetune.spans import bio_spans, is_bio, span_scores


def test_class_scores_are_those_counted_by_hand() -> None:
    # Class 0: 2 right, 1 missed, 0 wrong; class 1: 1 right, 0 missed, 2 wrong; class 2: 0 of 1.
    scores = class_scores([0, 0, 1, 1, 1], [0, 0, 0, 1, 2], 4)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1_micro"] == pytest.approx(3 / 5)
    assert scores["f1_macro"] == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)  # class 3 does not occur
    # Matthews for several classes: (c·s - Σ p·t) / √((s² - Σ p²)(s² - Σ t²)).
    expected = (3 * 5 - (2 * 3 + 3 * 1)) / math.sqrt((25 - 4 - 9) * (25 - 9 - 1 - 1))
    assert scores["matthews"] == pytest.approx(expected)


def test_matthews_of_one_predicted_class_is_zero() -> None:
    assert class_scores([1, 1, 1], [0, 1, 0], 2)["matthews"] == 0.0


def test_correlations_are_pearsons_and_spearmans() -> None:
    predicted, gold = [1.0, 2.0, 4.0, 3.0], [1.0, 8.0, 27.0, 64.0]
    found = correlations(predicted, gold)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, gold)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)  # 1 - 6·2 / (4·15)


def test_correlations_of_a_constant_are_zero() -> None:
    assert correlations([2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert correlations([2.0], [1.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_correlations_of_nearly_constant_predictions_are_still_right() -> None:
    predicted = [1.0, 1.0 + 1e-7, 1.0 + 2e-7]
    assert correlations(predicted, [1.0, 2.0, 3.0])["pearson"] == pytest.approx(1.0, abs=1e-4)


def test_answers_are_scored_as_squad_does_with_the_best_of_several() -> None:
    scores = answer_scores(["The cat!", "in old rome", "x"], [["cat"], ["oslo", "rome"], ["y"]])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx((1 + 2 * (1 / 3) / (1 / 3 + 1) + 0) / 3)


def test_bio_spans() -> None:
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER", "I-PER", "O", "I-ORG"]
    assert bio_spans(tags) == {
        (0, 2, "PER"),
        (3, 4, "LOC"),
        (4, 5, "LOC"),
        (5, 7, "PER"),  # an I- of another type begins a span
        (8, 9, "ORG"),  # and so does one after O
    }
    assert bio_spans(["O", "O"]) == set()


def test_span_scores_count_exact_spans_only() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG", "O", "B-LOC"]]
    # Right: PER. Wrong: a wrong type, one word too few, one that is not there.
    assert span_scores(predicted, gold) == {
        "span_f1": pytest.approx(2 / 7),
        "span_precision": pytest.approx(1 / 4),
        "span_recall": pytest.approx(1 / 3),
    }
    assert set(span_scores([["O"]], [["O"]]).values()) == {0}


def test_tags_are_bio_or_not() -> None:
    assert is_bio(["O", "B-x", "I-x"])
    assert not is_bio(["O"])
    assert not is_bio(["NOUN", "B-x"])


def test_the_best_span_is_the_one_of_all_that_are_allowed() -> None:
    random = np.random.default_rng(0)
    start, end = random.normal(size=(2, 9)).astype(np.float32)
    first = np.array([-1, -1, 0, 2, 4, 6, 8, 10, -1], dtype=np.int32)
    behind = np.where(first < 0, -1, first + 1)
    spans = {
        (i, j): float(start[i]) + float(end[j])
        for i in range(2, 8)
        for j in range(i, min(i + 3, 8))
    }
    best = max(spans, key=lambda span: spans[span])
    found = best_span(start, end, first, behind, 3)
    assert (found.start, found.end) == (first[best[0]], behind[best[1]])
    share = math.exp(spans[best]) / sum(math.exp(score) for score in spans.values())
    assert best_of([found])[1] == pytest.approx(share, rel=1e-5)


def test_of_several_windows_the_best_answer_counts() -> None:
    zero, first = np.zeros(2, dtype=np.float32), np.array([0, 5], dtype=np.int32)
    weak = best_span(zero, zero, first, first + 4, 1)
    strong = best_span(zero + 1, zero, first + 20, first + 24, 1)
    best, share = best_of([weak, strong])
    assert best.start == 20
    assert share == pytest.approx(math.e / (2 + 2 * math.e))


def test_the_summary_has_the_mean_and_the_sample_deviation() -> None:
    found = summary([{"test": {"f1": 0.5}}, {"test": {"f1": 0.7}}, {"test": {"f1": 0.9}}])
    assert found["test"]["f1"] == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.2),
        "seeds": 3,
    }
    assert summary([{"dev": {"f1": 0.5}}])["dev"]["f1"]["std"] is None
