"""Each head: what is learned from a row, and what its logits are taken to say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.finetune.tiny import make_tokenizer, task, write_rows
from trainer.finetune.encoded import PaddedBatches
from trainer.finetune.errors import TaskDataError
from trainer.finetune.task import read_task

CONTEXT = "the cat is here and the dog is in rome, the bird is in oslo, a fish is in lima"


def rows_of(home: Path, *rows: dict[str, Any]) -> Path:
    return write_rows(home / "rows.jsonl", rows)


def as_words(tokenizer: Any, ids: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


def test_pairs_are_tokenised_with_types_and_the_longer_text_is_cut(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = rows_of(
        tmp_path,
        {"text": "a cat", "text_pair": "the dog is here", "label": 1},
        {"text": "a fig", "text_pair": "cat " * 9, "label": 0},
    )
    head = read_task(task("classification", path, max_length=10))
    encoded = head.encode("train", tokenizer)
    assert as_words(tokenizer, encoded[0]["input_ids"]) == (
        "[CLS] a cat [SEP] the dog is here [SEP]"
    )
    assert encoded[0]["token_type_ids"].tolist() == [0] * 4 + [1] * 5
    assert as_words(tokenizer, encoded[1]["input_ids"]) == (
        "[CLS] a fig [SEP]" + " cat" * 5 + " [SEP]"
    )
    assert (encoded.cut, encoded.lengths) == (1, [9, 10])
    assert head.model_options()["id2label"] == {0: "0", 1: "1"}


def test_without_a_second_column_rows_are_single_texts(tmp_path: Path) -> None:
    path = rows_of(tmp_path, {"text": "a", "label": "x"}, {"text": "the", "label": "y"})
    assert "of texts into 2 labels" in read_task(task("classification", path)).describe()
    with pytest.raises(TaskDataError, match=r"no column 'second'.*task\.text_pair"):
        read_task(task("classification", path, text_pair="second"))


def test_numbers_are_labels_in_their_order_and_predictions_have_their_probabilities(
    tmp_path: Path,
) -> None:
    path = rows_of(tmp_path, *({"text": "a", "label": n, "id": f"q{n}"} for n in (10, 9, -1)))
    head = read_task(task("classification", path))
    encoded = head.encode("train", make_tokenizer())
    logits = np.log(np.array([[1, 1, 2], [1, 6, 3], [1, 4, 5]], dtype=np.float32))
    found = head.predictions("train", encoded, logits)
    assert [(p.id, p.gold, p.predicted) for p in found] == [
        ("q10", "10", "10"),
        ("q9", "9", "9"),
        ("q-1", "-1", "10"),
    ]
    assert found[1].probabilities == pytest.approx({"-1": 0.1, "9": 0.6, "10": 0.3})
    assert head.scores(found)["accuracy"] == pytest.approx(2 / 3)


def test_regression_takes_numbers_and_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na cat,1.5\nthe dog,-2\n")
    head = read_task(task("regression", path))
    encoded = head.encode("dev", make_tokenizer())
    batch = PaddedBatches(pad_token_id=0)([encoded[0], encoded[1]])
    assert batch["labels"].tolist() == [1.5, -2.0]
    found = head.predictions("dev", encoded, np.array([[3.0], [1.0]], dtype=np.float32))
    assert [(p.id, p.gold, p.predicted) for p in found] == [("1", 1.5, 3.0), ("2", -2.0, 1.0)]
    assert head.scores(found)["pearson"] == pytest.approx(1.0)


def test_batches_are_padded_to_their_longest(tmp_path: Path) -> None:
    path = rows_of(
        tmp_path,
        {"tokens": ["a", "cats"], "tags": ["O", "B-x"]},
        {"tokens": ["rome"], "tags": ["B-x"]},
    )
    encoded = read_task(task("token_classification", path)).encode("train", make_tokenizer())
    batch = PaddedBatches(pad_token_id=7)([encoded[0], encoded[1]])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert batch["input_ids"].tolist() == [[2, 14, 5, 21, 3], [2, 22, 3, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    # Only a word's first token has its tag: "cats" is "cat" and "##s".
    assert batch["labels"].tolist() == [[-100, 1, 0, -100, -100], [-100, 0, -100, -100, -100]]


def test_tags_are_read_at_first_tokens_and_words_behind_the_limit_count_as_cut(
    tmp_path: Path,
) -> None:
    words = ["cats", "the", "dogs", "is", "here", "in", "rome"]
    tags = ["B-A", "O", "B-A", "O", "O", "O", "B-A"]
    path = rows_of(tmp_path, {"tokens": words, "tags": tags}, {"tokens": ["a"], "tags": ["O"]})
    head = read_task(task("token_classification", path, max_length=8))
    encoded = head.encode("train", make_tokenizer())
    assert (encoded.cut, encoded.words_left_out) == (1, 3)
    logits = np.zeros((2, 8, 2), dtype=np.float32)
    logits[:, :, 1] = 1.0  # O everywhere
    logits[0, [1, 2, 4], 0] = 2.0  # but B-A at cat, ##s and dog
    found = head.predictions("train", encoded, logits)
    assert found[0].predicted == ["B-A", "O", "B-A", "O"]
    assert found[0].gold == tags[:4]
    assert head.scores(found)["span_f1"] == 1.0
    assert len(found[0].probabilities) == 4


def test_tags_that_are_not_bio_have_no_spans(tmp_path: Path) -> None:
    path = rows_of(tmp_path, {"tokens": ["a", "cat"], "tags": [0, 1]})
    with pytest.raises(TaskDataError, match="tags are not BIO"):
        read_task(task("token_classification", path))
    head = read_task(task("token_classification", path, metric="f1_macro"))
    encoded = head.encode("train", make_tokenizer())
    found = head.predictions("train", encoded, np.zeros((1, 4, 2), dtype=np.float32))
    assert set(head.scores(found)) == {"accuracy", "f1_micro", "f1_macro"}


def test_a_long_context_becomes_windows_and_the_answer_is_cut_from_the_original(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer()
    context = CONTEXT.replace("oslo", "OSLO")
    answers = {"text": ["OSLO"], "answer_start": [context.index("OSLO")]}
    path = rows_of(
        tmp_path, {"question": "where is the bird", "context": context, "answers": answers}
    )
    head = read_task(task("question_answering", path, doc_stride=4))
    encoded = head.encode("train", tokenizer)
    assert len(encoded) > 2
    held = []
    logits = np.full((2, len(encoded), 16), -5.0, dtype=np.float32)
    for window in range(len(encoded)):
        row = encoded[window]
        begin, end = int(row["start_positions"]), int(row["end_positions"])
        words = tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
        assert (begin > 0) == ("oslo" in words)
        if begin:
            held.append(window)
            assert words[begin : end + 1] == ["oslo"]
            logits[0, window, begin] = logits[1, window, end] = 5.0
        else:
            logits[:, window, 0] = 9.0  # [CLS] is no answer, however likely it is
    assert held
    found = head.predictions("train", encoded, tuple(logits))
    assert (found[0].predicted, found[0].gold) == ("OSLO", ["OSLO"])
    assert head.scores(found) == {"f1": 1.0, "exact_match": 1.0}


def test_answers_in_two_columns_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text("question,context,answer_text,answer_start\nwho,a cat is here,cat,2\n")
    head = read_task(task("question_answering", path, doc_stride=2))
    row = head.encode("train", make_tokenizer())[0]
    assert (int(row["start_positions"]), int(row["end_positions"])) == (4, 4)


def test_several_answers_are_all_right(tmp_path: Path) -> None:
    answers = {"text": ["rome", "in rome"], "answer_start": [6, 3]}
    path = rows_of(
        tmp_path, {"question": "where", "context": "is in rome", "answers": answers | {}}
    )
    head = read_task(task("question_answering", path, doc_stride=2))
    encoded = head.encode("train", make_tokenizer())
    logits = np.zeros((2, 1, 8), dtype=np.float32)
    logits[0, 0, 4] = logits[1, 0, 5] = 3.0
    found = head.predictions("train", encoded, tuple(logits))
    assert found[0].predicted == "in rome"
    assert head.scores(found)["exact_match"] == 1.0
