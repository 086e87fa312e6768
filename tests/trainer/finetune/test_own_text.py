"""Which rows say the same, and that a row which is trained on never finds an entry of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.modules.module import register_module_forward_hook

from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import PlugLMForSequenceClassification
from tests.trainer.finetune.tiny import (
    make_store,
    make_tokenizer,
    pet_or_fruit,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.finetune.own_text import (
    FIRST_SAMPLE_DOC_ID,
    normalised,
    rows_seen_in_training,
    sample_doc_id,
)
from trainer.finetune.run import check, claim, finetune
from trainer.settings_fields import ConfigError


def test_case_width_and_white_space_make_no_other_text() -> None:
    assert normalised(" The  CAT\tis\n\uff28ere ") == "the cat is here"
    assert sample_doc_id(["The  cat"]) == sample_doc_id(["the cat "])
    assert sample_doc_id(["the cat"]) != sample_doc_id(["the cats"])
    assert sample_doc_id(["a b", "c"]) != sample_doc_id(["a", "b c"])
    assert FIRST_SAMPLE_DOC_ID <= sample_doc_id(["x"]) < 2**63 - 2**38


def test_repeated_rows_are_found_by_split(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [
        {"text": "The cat", "label": "a"}, {"text": "a pear", "label": "b"},
        {"text": "the plum", "label": "b"},
    ])  # fmt: skip
    dev = write_rows(tmp_path / "dev.jsonl", [{"text": "A  Pear", "label": "a"}])
    test = write_rows(tmp_path / "test.jsonl", [
        {"text": "the dog", "label": "a"}, {"text": "the cat", "label": "b"},
        {"text": "the plum", "label": "b"},
    ])  # fmt: skip
    given = task("classification", train, dev=str(dev), test=str(test))
    assert rows_seen_in_training(given) == {"dev": [True], "test": [False, True, True]}
    fewer = task("classification", train, dev=str(dev), test=str(test), train_rows=2)
    assert rows_seen_in_training(fewer)["test"] == [False, True, False]


def memory_of_samples(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One entry per row under its own document, beside the nouns of the tiny memory."""
    make_store(path)
    store, tokenizer = Store.open(path), make_tokenizer()
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, padding="max_length", max_length=6, truncation=True)["input_ids"]
    write_segment(
        store.incoming / "b.arrow",
        ids=range(100, 100 + len(rows)),
        doc_ids=[sample_doc_id([text]) for text in texts],
        tokens_NS=np.array(encoded),
        texts=texts,
        titles=[""] * len(rows),
        sources=["samples"] * len(rows),
        meta=store.meta,
    )
    store.commit(add_segments=[store.incoming / "b.arrow"], domain="samples", message="samples")
    return path


def found_in_training(
    home: Path, store: Path, rows: list[dict[str, Any]], *, exclude: bool, mode: str
) -> list[tuple[int, list[int]]]:
    """(own document, documents that were found) of every row of every training pass."""
    # Rows repeat in other spellings, which share a document and a sequence of tokens.
    repeated = [{**row, "text": row["text"].upper()} for row in rows[:8]]
    train = write_rows(home / f"train-{exclude}-{mode}.jsonl", [*rows, *repeated])
    given = settings(
        task("classification", train, dev=str(write_rows(home / "dev.jsonl", rows[:4]))),
        home / "pluglm",
        home / f"run-{exclude}-{mode}",
        # All entries but those of one document, so that what may be found is found.
        memory={
            "store": str(store),
            "top_k": 8 + len(rows) - 1,
            "mode": mode,
            "exclude_own_samples": exclude,
        },
    )
    tokenizer = make_tokenizer()
    own = {tuple(tokenizer(r["text"])["input_ids"]): sample_doc_id([r["text"]]) for r in rows}
    seen: list[tuple[int, list[int]]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, PlugLMForSequenceClassification) or not module.training:
            return
        for tokens, mask, doc_ids in zip(
            kwargs["input_ids"],
            kwargs["attention_mask"],
            output.retrievals[-1].retrieved.doc_ids,
            strict=True,
        ):
            seen.append((own[tuple(tokens[mask.bool()].tolist())], doc_ids.tolist()))

    handle = register_module_forward_hook(look, with_kwargs=True)
    try:
        checked = check(given, say=lambda line: None)
        claim(given, resume=False)
        finetune(given, checked, say=lambda line: None)
    finally:
        handle.remove()
    assert len(seen) == given.train.epochs * (len(rows) + len(repeated))
    return seen


@pytest.mark.parametrize("mode", ["live", "frozen"])
def test_a_row_never_finds_an_entry_of_its_own_text_while_it_is_trained_on(
    tmp_path: Path, mode: str
) -> None:
    rows = pet_or_fruit(16)
    save_pluglm(tmp_path / "pluglm")
    store = memory_of_samples(tmp_path / "store", rows)
    everything = {*range(8), *(sample_doc_id([row["text"]]) for row in rows)}
    assert len(everything) == 24
    for own, found in found_in_training(tmp_path, store, rows, exclude=True, mode=mode):
        # All others are found, its own is not: with one place fewer than entries, that is all.
        assert set(found) == everything - {own}
    # The same look sees the leak where nothing keeps it out.
    leaky = found_in_training(tmp_path, store, rows, exclude=False, mode=mode)
    assert sum(own in found for own, found in leaky) > len(leaky) / 2


def test_only_rows_of_texts_have_samples_of_their_own(tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "cat"], "tags": ["O", "B-x"]}]
    train = write_rows(tmp_path / "train.jsonl", rows)
    save_pluglm(tmp_path / "pluglm")
    given = settings(
        task("token_classification", train),
        tmp_path / "pluglm",
        tmp_path / "run",
        memory={
            "store": str(make_store(tmp_path / "store")),
            "exclude_own_samples": True,
            "top_k": 2,
        },
    )
    with pytest.raises(ConfigError, match=r"exclude_own_samples = true: must be false with task"):
        check(given, say=lambda line: None)


def test_runs_of_before_go_on_though_they_know_neither_domains_nor_own_samples(
    tmp_path: Path,
) -> None:
    train = write_rows(tmp_path / "train.jsonl", pet_or_fruit(8))
    save_pluglm(tmp_path / "pluglm")
    store = {"store": str(make_store(tmp_path / "store")), "top_k": 2}
    given = settings(
        task("classification", train), tmp_path / "pluglm", tmp_path / "run", memory=store
    )
    claim(given, resume=False)
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text(encoding="utf-8"))
    assert not {"memory.domains", "memory.exclude_own_samples"} & set(kept)
