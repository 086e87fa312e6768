"""What is wrong with a task's rows is said before any training, with file, line and column."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finetune.tiny import make_tokenizer, task, write_rows
from trainer.finetune.errors import TaskDataError
from trainer.finetune.settings import TaskSettings
from trainer.finetune.task import read_task

GOOD = {
    "classification": [{"text": "a", "label": "x"}, {"text": "the", "label": "y"}],
    "regression": [{"text": "a", "label": 1.0}, {"text": "the", "label": 2}],
    "token_classification": [{"tokens": ["a", "cat"], "tags": ["O", "B-x"]}],
    "question_answering": [
        {"question": "who", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}}
    ],
}


def qa(text: Any, start: Any) -> dict[str, Any]:
    answers = {"text": text, "answer_start": start}
    return {"question": "who", "context": "a cat", "answers": answers}


def read_and_encode(given: TaskSettings) -> None:
    read_task(given).encode("dev", make_tokenizer())


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("classification", {"text": "a", "label": "z"}, "column 'label': the label 'z' is not in"),
        ("classification", {"text": "a", "label": None}, "column 'label': no value"),
        ("classification", {"text": "a", "label": 1.0}, "column 'label': float 1.0"),
        ("classification", {"text": "a", "label": True}, "column 'label': bool True"),
        ("classification", {"text": 3, "label": "x"}, "column 'text': int 3; it must be text"),
        ("classification", {"label": "x"}, "column 'text': no value"),
        ("classification", {"text": " ", "label": "x"}, "column 'text': the text has no tokens"),
        ("regression", {"text": "a", "label": float("nan")}, "column 'label': nan; it must be"),
        ("regression", {"text": "a", "label": "much"}, "column 'label': 'much'; it must be"),
        ("regression", {"text": "a", "label": True}, "column 'label': True; it must be"),
        ("token_classification", {"tokens": [], "tags": []}, "column 'tokens': it must be a list"),
        ("token_classification", {"tokens": "a b", "tags": ["O"]}, "column 'tokens': it must be"),
        ("token_classification", {"tokens": ["a"], "tags": ["O", "O"]}, "2 tags for 1 words"),
        ("token_classification", {"tokens": ["a"], "tags": ["B-y"]}, "label 'B-y' is not in"),
        ("token_classification", {"tokens": [1], "tags": ["O"]}, "column 'tokens': 1; every word"),
        ("token_classification", {"tokens": [" "], "tags": ["O"]}, "the words have no tokens"),
        ("question_answering", qa(["cat"], [1]), "not in the context at character 1.*it is at 2"),
        ("question_answering", qa(["dog"], [0]), "it is nowhere in the context"),
        ("question_answering", qa(["cat"], [-3]), "begins at -3"),
        ("question_answering", qa(["cat"], ["two"]), "begins at 'two'"),
        ("question_answering", qa([" "], [1]), "an answer must be text"),
        ("question_answering", qa([], []), "leave unanswerable questions out"),
        ("question_answering", qa(["cat"], []), "lists of one length"),
        ("question_answering", qa("cat", 2), "lists of one length"),
        ("question_answering", {**qa(["cat"], [2]), "question": " "}, "column 'question'.*no tok"),
        ("question_answering", {**qa(["cat"], [2]), "question": "a " * 9}, "question has 9 tokens"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, kind: str, row: dict[str, Any], message: str) -> None:
    train = write_rows(tmp_path / "train.jsonl", GOOD[kind])
    dev = write_rows(tmp_path / "dev.jsonl", [*GOOD[kind], row])
    line = len(GOOD[kind]) + 1
    given = task(kind, train, dev=str(dev), doc_stride=5, max_length=16)
    with pytest.raises(TaskDataError, match=f"dev.jsonl, line {line}, .*{message}") as error:
        read_and_encode(given)
    assert "\n" not in str(error.value)


def test_an_unseen_label_names_the_nearest(tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train.jsonl", [{"text": "a", "label": "fruit"}, {"text": "a", "label": "pet"}]
    )
    dev = write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": "friut"}])
    with pytest.raises(TaskDataError, match="did you mean 'fruit'"):
        read_task(task("classification", train, dev=str(dev)))


def test_one_label_is_nothing_to_learn(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": "pet"}] * 2)
    with pytest.raises(TaskDataError, match="nothing to tell apart"):
        read_task(task("classification", train))


def test_an_empty_second_text_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "text_pair": "the", "label": n} for n in (0, 1)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [{"text": "a", "text_pair": "", "label": 0}])
    head = read_task(task("classification", train, test=str(test)))
    with pytest.raises(
        TaskDataError, match=r"test.jsonl, line 1, column 'text_pair': .* no tokens"
    ):
        head.encode("test", make_tokenizer())


def test_a_split_without_the_column_is_named(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", GOOD["classification"])
    dev = write_rows(tmp_path / "dev.jsonl", [{"text": "a", "lable": "x"}])
    with pytest.raises(TaskDataError, match=r"dev.jsonl: there is no column 'label'.*'lable'"):
        read_task(task("classification", train, dev=str(dev)))


def test_labels_that_a_split_lacks_are_told(tmp_path: Path) -> None:
    rows = [{"text": "the cat", "label": name} for name in ("a", "b", "c")]
    train = write_rows(tmp_path / "train.jsonl", rows)
    dev = write_rows(tmp_path / "dev.jsonl", rows[:1])
    said = read_task(task("classification", train, dev=str(dev))).describe()
    assert said.endswith("3 labels; rows: 3 train, 1 dev; dev has none of 'b', 'c'")
