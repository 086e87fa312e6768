"""The loss by which a row's query finds the key of its own text, alone and in fine-tuning."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from model import PlugLMForSequenceClassification
from model.retrieval import LayerRetrieval
from tests.trainer.finetune.tiny import (
    make_store,
    make_tokenizer,
    pet_or_fruit,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.finetune.own_key import as_entries, own_key_loss
from trainer.finetune.run import check, claim, finetune
from trainer.finetune.settings import FinetuneSettings, MemorySettings
from trainer.settings_fields import ConfigError


def test_rows_become_entries_without_separators_and_no_longer_than_these() -> None:
    rows_BT = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 0, 0, 0]])
    made_BS = as_entries(rows_BT, entry_tokens=5, separator=3, pad=0)
    assert made_BS.tolist() == [[2, 5, 6, 0, 7], [2, 8, 0, 0, 0]]
    assert as_entries(rows_BT, entry_tokens=2, separator=None, pad=0).tolist() == [[2, 5], [2, 8]]


class Model:
    """Keys that are known: each row's second token, one-hot."""

    config = SimpleNamespace(pad_token_id=0)

    @property
    def base_model(self) -> Any:
        return self

    def entry_keys(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens_BS[:, 1], 4).float()


def reported(query_BQ: torch.Tensor) -> LayerRetrieval:
    nothing: Any = None
    return LayerRetrieval(layer=1, query_BQ=query_BQ, key_BKQ=query_BQ, retrieved=nothing)


def loss_of(
    queries: list[list[float]], rows: list[list[int]], right_entries: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    query_BQ = torch.tensor(queries, requires_grad=True)
    loss = own_key_loss(
        Model(),
        [reported(query_BQ)],
        torch.tensor(rows),
        entry_tokens=4,
        separator=None,
        right_entries=right_entries,
    )
    loss.backward()
    assert query_BQ.grad is not None
    return loss.item(), query_BQ.grad


def test_the_loss_is_the_cross_entropy_of_the_own_text() -> None:
    # Scores are inner products over sqrt(Q) = 2: 3 for the own key, 0 for the two others.
    right = [[0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.0], [0.0, 0.0, 0.0, 6.0]]
    loss, grad_BQ = loss_of(right, [[2, 1], [2, 2], [2, 3]])
    assert loss == pytest.approx(math.log(math.exp(3) + 2) - 3, abs=1e-6)
    assert grad_BQ.abs().sum() > 0
    same = [[0.0, 6.0, 0.0, 0.0]] * 3
    assert loss_of(same, [[2, 1], [2, 2], [2, 3]])[0] > loss + 1


def test_rows_of_one_text_do_not_push_each_other_away() -> None:
    queries = [[0.0, 6.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.0]]
    loss, _ = loss_of(queries, [[2, 1], [2, 1], [2, 2]])
    one = math.log(math.exp(3) + 1) - 3
    # The first two have one negative each, and the third two.
    assert loss == pytest.approx((2 * one + math.log(math.exp(3) + 2) - 3) / 3, abs=1e-6)
    assert loss_of([[0.0, 6.0, 0.0, 0.0]], [[2, 1]])[0] == 0


def given_settings(tmp_path: Path, name: str, **memory: Any) -> FinetuneSettings:
    rows = write_rows(tmp_path / "train.jsonl", pet_or_fruit(32) * 10)
    store = tmp_path / "store"
    if not store.exists():
        make_store(store)
        save_pluglm(tmp_path / "pluglm")
    return settings(
        task("classification", rows),
        tmp_path / "pluglm",
        tmp_path / name,
        memory={"store": str(store), "top_k": 2, **memory},
        train={"epochs": 1},  # of several the best would be kept, which can be the first
    )


def own_key_loss_after(given: FinetuneSettings) -> float:
    """Fine-tune with one seed; the loss of its model over rows of different texts."""
    checked = check(given, say=lambda line: None)
    claim(given, resume=False)
    finetune(given, checked, say=lambda line: None)
    seed = given.train.seeds[0]
    path = Path(given.run.dir) / f"seed-{seed}" / "model"
    model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert isinstance(model, PlugLMForSequenceClassification)
    texts = [row["text"] for row in pet_or_fruit(32)][:16]
    batch = make_tokenizer()(texts, padding=True, return_tensors="pt")
    answer = Answer(2, 6)
    with torch.no_grad():
        output = model(**batch, lookup=answer)
        return float(
            own_key_loss(model, output.retrievals, batch["input_ids"], entry_tokens=6, separator=3)
        )


class Answer:
    """A memory that answers everything with the same entries."""

    def __init__(self, k: int, length: int) -> None:
        self.k, self.length = k, length

    def __call__(self, queries_BQ: torch.Tensor) -> Any:
        ids_BK = torch.arange(self.k).expand(len(queries_BQ), -1)
        tokens_BKS = (5 + ids_BK)[..., None].expand(-1, -1, self.length)

        class Found:
            ids, tokens, doc_ids = ids_BK, tokens_BKS, ids_BK

        return Found()


def test_with_a_weight_fine_tuning_learns_to_tell_texts_apart(tmp_path: Path) -> None:
    without = own_key_loss_after(given_settings(tmp_path, "without"))
    learned = own_key_loss_after(
        given_settings(tmp_path, "with", retrieval_loss_weight=3.0, refresh_every_steps=2)
    )
    assert learned < 0.9 * without


def test_settings_that_cannot_learn_retrieval_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retrieval_loss_weight = 1: must be 0 with.*frozen"):
        MemorySettings(store="x", mode="frozen", retrieval_loss_weight=1.0)
    with pytest.raises(ConfigError, match=r"memory\.retrieval_loss_weight"):
        MemorySettings(store="x", retrieval_loss_weight=-1.0)
    given = given_settings(tmp_path, "run", retrieval_loss_weight=0.5)
    alone = replace(given, train=replace(given.train, batch_size=1))
    with pytest.raises(ConfigError, match=r"at least 2.*got 1"):
        check(alone, say=lambda line: None)
