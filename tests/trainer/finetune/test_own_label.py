"""`memory.find_own_label`: rows whose query must find samples of their own label."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_server.store.store import Store
from model.retrieval import LayerRetrieval
from tests.trainer.finetune.test_own_key import Model, reported
from tests.trainer.finetune.tiny import (
    make_store,
    make_tokenizer,
    pet_or_fruit,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.finetune.encoded import RIGHT_ENTRIES
from trainer.finetune.errors import TaskDataError
from trainer.finetune.own_key import own_label_loss
from trainer.finetune.run import check
from trainer.finetune.settings import FinetuneSettings, MemorySettings
from trainer.settings_fields import ConfigError


def loss_of(labels: list[int], doc_ids: list[int]) -> tuple[float, torch.Tensor]:
    """Of three rows: the query of each is 6 times the key of the next, and Q = 4."""
    keys = torch.eye(4)[1:]
    query_BQ = (6 * keys[[1, 2, 0]]).requires_grad_()
    report: LayerRetrieval = reported(query_BQ)
    samples = torch.tensor([[2, 1], [2, 2], [2, 3]])
    loss = own_label_loss(Model(), [report], samples, torch.tensor(labels), torch.tensor(doc_ids))
    loss.backward()
    assert query_BQ.grad is not None
    return loss.item(), query_BQ.grad


def test_a_row_finds_samples_of_its_label_among_those_of_others() -> None:
    # Scores over sqrt(Q): row 0 has 3 for sample 1 and 0 for sample 2; its own plays no part.
    near, far = math.log(math.exp(3) + 1) - 3, math.log(math.exp(3) + 1)
    # Rows 0 and 1 are each other's right ones: row 0 is near it, row 1 is near sample 2.
    loss, grad_BQ = loss_of([5, 5, 6], [10, 11, 12])
    assert loss == pytest.approx((near + far) / 2, abs=1e-6)
    assert grad_BQ[:2].abs().sum() > 0
    assert grad_BQ[2].abs().sum() == 0, "no sample has its label: nothing to learn"
    # All of one label: the mean over both right ones.
    assert loss_of([5, 5, 5], [10, 11, 12])[0] == pytest.approx((near + far) / 2, abs=1e-6)


def test_what_a_row_may_not_read_is_neither_right_nor_wrong() -> None:
    near = math.log(math.exp(3) + 1) - 3
    # Rows 1 and 2 are of one text: row 1 has sample 0 alone to find, and no other to tell it from.
    loss, _ = loss_of([5, 5, 6], [10, 11, 11])
    assert loss == pytest.approx((near + 0) / 2, abs=1e-6)
    loss, grad_BQ = loss_of([5, 6, 7], [10, 11, 12])
    assert loss == 0
    assert torch.isfinite(grad_BQ).all()
    assert loss_of([5, 5, 5], [10, 10, 10])[0] == 0


def with_samples(tmp_path: Path, rows: list[dict[str, Any]]) -> FinetuneSettings:
    """A memory whose domain `in-task` has an entry of each row, as `pluglm in-task` makes it."""
    from memory_server.store.segments import write_segment
    from trainer.finetune.own_text import sample_doc_id

    place, model = tmp_path / "store", save_pluglm(tmp_path / "pluglm")
    store = Store.open(make_store(place))
    texts = [f"{number} {row['label']} {row['text']}" for number, row in enumerate(rows)]
    tokens = make_tokenizer()(
        [f"{FILLERS[number % 4]} {row['text']}" for number, row in enumerate(rows)],
        padding="max_length", max_length=6, truncation=True, return_tensors="np",
    )["input_ids"]  # fmt: skip
    write_segment(
        store.incoming / "b.arrow",
        ids=range(100, 100 + len(rows)),
        doc_ids=[sample_doc_id([row["text"]]) for row in rows],
        tokens_NS=tokens,
        texts=texts,
        titles=texts,
        sources=["train"] * len(rows),
        meta=store.meta,
    )
    store.commit(add_segments=[store.incoming / "b.arrow"], message="samples")
    train = write_rows(tmp_path / "train.jsonl", rows)
    return settings(
        task("classification", train),
        model,
        tmp_path / "run",
        memory={
            "store": str(place),
            "retrieval_loss_weight": 1.0,
            "exclude_own_samples": True,
            "find_own_label": True,
        },
    )


FILLERS = ["the", "a", "is", "here"]


def test_each_row_has_the_entry_of_its_own_and_of_its_own_text(tmp_path: Path) -> None:
    rows = pet_or_fruit(6)
    rows.insert(3, rows[0])  # one text twice: two entries of one document
    given = with_samples(tmp_path, rows)
    encoded = check(given, say=lambda line: None).encoded["train"]
    tokenizer = make_tokenizer()
    for number, row in enumerate(rows):
        expected = tokenizer(f"{FILLERS[number % 4]} {row['text']}")["input_ids"][:6]
        kept = encoded.kept(RIGHT_ENTRIES, number).tolist()
        assert kept[:5] == expected[:5]
        assert 0 not in kept


def test_a_row_without_an_entry_is_named(tmp_path: Path) -> None:
    given = with_samples(tmp_path, pet_or_fruit(4))
    rows = [*pet_or_fruit(2), {"text": "a bird in rome", "label": "pet"}]
    write_rows(Path(given.task.train), rows)
    with pytest.raises(TaskDataError, match=r"train\.jsonl', row 3: the memory .* has no entry"):
        check(given, say=lambda line: None)


def test_settings_that_cannot_learn_labels_are_refused() -> None:
    for options, told in (
        ({}, "retrieval_loss_weight above 0"),
        ({"retrieval_loss_weight": 1.0}, "exclude_own_samples = true"),
        (
            {"retrieval_loss_weight": 1.0, "exclude_own_samples": True, "right_entry": "passage"},
            "set one of the two",
        ),
    ):
        given: dict[str, Any] = options
        with pytest.raises(ConfigError, match=told):
            MemorySettings(store="x", find_own_label=True, **given)
