"""transformers.Trainer over models with a memory attached: what it collects, and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from memory_server.store.store import Store
from tests.ecosystem.colours import FACTS, fact, make_memory, make_model, make_tokenizer

COLOURS = list(FACTS.values())


def rows() -> list[dict[str, Any]]:
    """Claims that are right or wrong, of different lengths."""
    tokenizer = make_tokenizer()
    told = [(fact(noun, colour), 1) for noun, colour in FACTS.items()]
    told += [
        (f"{noun} is {colour}", 0) for noun, colour in zip(FACTS, reversed(COLOURS), strict=True)
    ]
    return [dict(tokenizer(text)) | {"labels": label} for text, label in told]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(directory), **(given | options))


def make_trainer(directory: Path, store: Store, head: str = "", **options: Any) -> Trainer:
    model = make_model(head or "SequenceClassification", dropout=0.1)
    model.attach(make_memory(store, model))
    tokenizer = make_tokenizer()
    masked = head == "MaskedLM"
    texts = rows()
    if masked:
        texts = [{k: v for k, v in row.items() if k != "labels"} for row in texts]
    return Trainer(
        model=model,
        args=arguments(directory, **options),
        train_dataset=texts,
        eval_dataset=texts,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
        if masked
        else DataCollatorWithPadding(tokenizer),
        compute_metrics=None if masked else accuracy,
    )


def accuracy(given: Any) -> dict[str, float]:
    # A tuple here would mean that reports on the memory were collected as predictions.
    assert isinstance(given.predictions, np.ndarray)
    return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}


def test_it_learns_evaluates_and_predicts_with_the_memory(tmp_path: Path, store: Store) -> None:
    trainer = make_trainer(tmp_path, store, max_steps=40, per_device_eval_batch_size=3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_accuracy"] == 1.0
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape == (len(rows()), 2)
    model = trainer.model
    assert model.has_memory
    with torch.no_grad():
        for row, logits in zip(rows(), predicted.predictions, strict=True):
            wanted = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-5)


def test_predictions_may_be_left_in_batches(tmp_path: Path, store: Store) -> None:
    trainer = make_trainer(tmp_path, store, eval_do_concat_batches=False)
    trainer.compute_metrics = None
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert [batch.shape for batch in predictions] == [(8, 2), (8, 2)]


def test_masked_language_modelling_with_its_collator(tmp_path: Path, store: Store) -> None:
    trainer = make_trainer(tmp_path, store, "MaskedLM", max_steps=30)
    torch.manual_seed(0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    torch.manual_seed(0)
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    loaded = AutoModelForMaskedLM.from_pretrained(saved)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_run_goes_on_from_its_checkpoint_as_if_never_stopped(
    tmp_path: Path, store: Store
) -> None:
    """With query BatchNorm, whose statistics must come back, too."""

    def trainer(directory: str) -> Trainer:
        made = make_trainer(tmp_path / directory, store, max_steps=6, save_strategy="steps",
                            save_steps=3)  # fmt: skip
        model = make_model("SequenceClassification", dropout=0.1, query_norm="batch")
        model.attach(make_memory(store, model))
        made.model = made.model_wrapped = model
        return made

    whole = trainer("whole")
    whole.train()
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, msg=name)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_accumulated_batches_are_one_large_batch(tmp_path: Path, store: Store) -> None:
    """Layer-normed queries: every sequence stands alone."""
    ends = []
    for accumulate in (1, 2):
        trainer = make_trainer(
            tmp_path / str(accumulate),
            store,
            max_steps=2,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "probs_dropout"):
                module.probs_dropout = 0.0
        trainer.train()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_bf16_leaves_search_softmax_and_statistics_in_full_precision(
    tmp_path: Path, store: Store
) -> None:
    trainer = make_trainer(tmp_path, store, bf16=True)
    model = make_model("SequenceClassification", query_norm="batch")
    memory = make_memory(store, model)
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            seen.setdefault(name, set()).add(value.dtype)

    def lookup(queries_BQ: Tensor) -> Any:
        note("search", queries_BQ)
        return memory.search(queries_BQ, 3)

    model.attach(lookup)
    layer = model.pluglm.layers[-1]
    layer.query_norm.register_forward_hook(lambda _, given, made: note("query", made))
    layer.knowledge_attention.register_forward_hook(lambda _, given, made: note("softmax", made[1]))
    layer.ffn.dense_in.register_forward_hook(lambda _, given, made: note("matmul", made))
    model.pluglm.entry_encoder.key_proj.register_forward_hook(
        lambda _, given, made: note("key", made)
    )
    trainer.model = trainer.model_wrapped = model
    trainer.train()
    assert seen.pop("matmul") == {torch.bfloat16}  # autocast was on
    wide = {torch.float32}
    assert seen == {"search": wide, "query": wide, "softmax": wide, "key": wide}
    norm = layer.query_norm
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.running_mean.any()
    assert int(norm.num_batches_tracked) == 4
    assert {p.dtype for p in model.parameters()} == wide


def test_activation_checkpointing_searches_no_more_often(tmp_path: Path, store: Store) -> None:
    searches = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, store, gradient_checkpointing=checkpointing)
        model = trainer.model
        memory = model._encoder()._lookup
        asked: list[int] = []

        def lookup(queries_BQ: Tensor, memory: Any = memory, asked: list[int] = asked) -> Any:
            asked.append(len(queries_BQ))
            return memory(queries_BQ)

        model.attach(lookup)
        trainer.train()
        searches.append(asked)
    assert searches[0] == searches[1] != []


def test_masked_lm_is_measured_as_bert_is(tmp_path: Path) -> None:
    """Dense logits where they are asked for, and nothing beside them."""
    model = make_model("MaskedLM", sparse_prediction=False)
    model.attach(None)
    tokenizer = make_tokenizer()
    rows = [dict(tokenizer(fact("apple", "red"))) for _ in range(4)]
    seen: list[tuple[int, ...]] = []

    def shapes(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"labelled": float((prediction.label_ids != -100).sum())}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        eval_dataset=rows,
        compute_metrics=shapes,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5),
    )
    trainer.evaluate()
    assert seen == [(4, len(rows[0]["input_ids"]), model.config.vocab_size)]
