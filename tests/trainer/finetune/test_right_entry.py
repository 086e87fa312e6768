"""`memory.right_entry`: rows whose data name the passage that their query must find."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.trainer.finetune.test_own_key import Answer, loss_of
from tests.trainer.finetune.tiny import (
    FRUIT,
    PETS,
    PLACES,
    make_store,
    make_tokenizer,
    pet_or_fruit,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.finetune.encoded import RIGHT_ENTRIES, PaddedBatches
from trainer.finetune.errors import TaskDataError
from trainer.finetune.run import check, claim, finetune
from trainer.finetune.settings import FinetuneSettings, MemorySettings
from trainer.settings_fields import ConfigError

NOUNS = [*PETS, *FRUIT]
PASSAGES = {
    noun: f"{PLACES[at % 4]} {('where', 'who')[at // 4]} and" for at, noun in enumerate(NOUNS)
}
"""Of each noun, and without a word of the rows'."""


def passages_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the passage of their noun."""
    nouns = [next(word for word in row["text"].split() if word in NOUNS) for row in rows]
    return [row | {"passage": PASSAGES[noun]} for row, noun in zip(rows, nouns, strict=True)]


def given_settings(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], **memory: Any
) -> FinetuneSettings:
    store, train = tmp_path / "store", write_rows(tmp_path / f"{name}.jsonl", rows)
    if not store.exists():
        make_store(store)
        save_pluglm(tmp_path / "pluglm")
    return settings(
        task("classification", train),
        tmp_path / "pluglm",
        tmp_path / name,
        memory={"store": str(store), "top_k": 2, "retrieval_loss_weight": 3.0, **memory},
        train={"epochs": 3},
    )


def passages_found(given: FinetuneSettings) -> float:
    """Fine-tune; the share of the nouns' rows whose query is nearest to their passage's key."""
    checked = check(given, say=lambda line: None)
    claim(given, resume=False)
    finetune(given, checked, say=lambda line: None)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        Path(given.run.dir) / "seed-0" / "model"
    ).eval()
    tokenizer = make_tokenizer()
    rows = tokenizer([f"here is the {noun}" for noun in NOUNS], return_tensors="pt")
    passages = tokenizer([PASSAGES[noun] for noun in NOUNS], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        query_BQ = model(**rows, lookup=Answer(2, 6)).retrievals[-1].query_BQ
        key_BQ = model.base_model.entry_keys(passages[:, :-1])
    return float(((query_BQ @ key_BQ.T).argmax(1) == torch.arange(len(NOUNS))).float().mean())


def test_queries_learn_to_find_the_passages_that_the_data_name(tmp_path: Path) -> None:
    rows = passages_of(pet_or_fruit(32) * 15)
    own_text = passages_found(given_settings(tmp_path, "own", rows))
    named = passages_found(given_settings(tmp_path, "named", rows, right_entry="passage"))
    assert own_text <= 0.375
    assert named >= 0.75


def test_the_loss_is_over_the_right_entries() -> None:
    # The rows are the same, their right entries are not: 3 for the right key, 0 for the others.
    queries = [[0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.0], [0.0, 0.0, 0.0, 6.0]]
    expected = loss_of(queries, [[2, 1], [2, 2], [2, 3]])[0]
    rows, right = [[2, 3, 3]] * 3, torch.tensor([[2, 1], [2, 2], [2, 3]])
    assert loss_of(queries, rows, right)[0] == pytest.approx(expected)


def test_right_entries_are_cut_as_entries_and_padded_by_themselves(tmp_path: Path) -> None:
    rows = passages_of(pet_or_fruit(2))
    rows[0]["passage"] = "rome and oslo and lima and bern"
    given = given_settings(tmp_path, "run", rows, right_entry="passage")
    encoded = check(given, say=lambda line: None).encoded["train"]
    tokenizer = make_tokenizer()
    first, second = (
        [tokenizer.cls_token_id, *tokenizer(row["passage"], add_special_tokens=False)["input_ids"]]
        for row in rows
    )
    batch = PaddedBatches(pad_token_id=0)([encoded[0], encoded[1]])
    assert batch[RIGHT_ENTRIES].tolist() == [first[:6], [*second, *[0] * (6 - len(second))]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)


@pytest.mark.parametrize(
    ("value", "told"), [(None, "no value"), (3, "int"), ("", "the text has no tokens")]
)
def test_a_row_without_its_passage_is_named(tmp_path: Path, value: Any, told: str) -> None:
    rows = passages_of(pet_or_fruit(4))
    rows[2]["passage"] = value
    given = given_settings(tmp_path, "run", rows, right_entry="passage")
    with pytest.raises(TaskDataError, match=rf"run\.jsonl.*\b3\b.*passage.*{told}"):
        check(given, say=lambda line: None)


def test_what_cannot_learn_from_right_entries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"right_entry = .passage.*retrieval_loss_weight above 0"):
        MemorySettings(store="x", right_entry="passage")
    given = given_settings(tmp_path, "run", pet_or_fruit(4), right_entry="passage")
    with pytest.raises(TaskDataError, match=r"passage.*memory\.right_entry"):
        check(given, say=lambda line: None)
    rows = [{"tokens": ["the", "cat"], "tags": ["O", "B-pet"], "passage": "rome"}] * 4
    words = task("token_classification", write_rows(tmp_path / "words.jsonl", rows))
    given = given_settings(tmp_path, "run", passages_of(pet_or_fruit(4)), right_entry="passage")
    twin = write_rows(tmp_path / "dev.jsonl", [*rows, *rows])
    with pytest.raises(ConfigError, match="only rows of texts have one right entry each"):
        check(replace(given, task=replace(words, dev=str(twin))), say=lambda line: None)
