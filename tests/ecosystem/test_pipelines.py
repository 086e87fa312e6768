"""transformers' pipelines over models that read a memory.

(transformers 5 has no question-answering pipeline any more; docs/ecosystem.md shows how to take the
span from the logits.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, pipeline

from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.ecosystem.colours import (
    FACTS,
    encode,
    fact,
    make_memory,
    make_model,
    make_tokenizer,
    write_facts,
)


@pytest.fixture
def reader(reader_dir: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(reader_dir)


def use_head(store: Store, memory: LocalMemory) -> None:
    epoch = memory.stage(encoder_step=0, content_version=store.head())
    memory.wait_sealed(epoch, 30)
    memory.activate(epoch)


def test_fill_mask_answers_what_the_memory_says_and_follows_its_edits(
    reader: Any, store: Store
) -> None:
    memory = make_memory(store, reader)
    reader.attach(memory)
    fill = pipeline("fill-mask", model=reader, tokenizer=make_tokenizer())

    def told(noun: str) -> str:
        return str(fill(fact(noun, "[MASK]"))[0]["token_str"])

    assert {noun: told(noun) for noun in FACTS} == FACTS
    # No weight is touched: an entry of the store is exchanged.
    changed = write_facts(store, "changed", {"snow": "black"}, first_id=100)
    store.commit(
        add_segments=[changed], remove_ids=[list(FACTS).index("snow")], message="dirty snow"
    )
    use_head(store, memory)
    assert told("snow") == "black"
    assert told("grass") == "green"
    reader.detach()
    right = sum(told(noun) == colour for noun, colour in FACTS.items())
    assert right < len(FACTS) / 2


def test_fill_mask_takes_several_texts_at_once(reader: Any, store: Store) -> None:
    reader.attach(make_memory(store, reader))
    reader.config.output_retrievals = False
    fill = pipeline("fill-mask", model=reader, tokenizer=make_tokenizer(), batch_size=3)
    told = fill([fact(noun, "[MASK]") for noun in FACTS], top_k=1)
    assert [one[0]["token_str"] for one in told] == list(FACTS.values())


def test_text_classification_gives_the_models_own_probabilities(store: Store) -> None:
    names = {0: "no", 1: "perhaps", 2: "yes"}
    model = make_model("SequenceClassification", num_labels=3, id2label=names)
    model.attach(make_memory(store, model))
    classify = pipeline("text-classification", model=model, tokenizer=make_tokenizer())
    given = {one["label"]: one["score"] for one in classify("snow is bad", top_k=None)}
    with torch.no_grad():
        wanted = model(**encode("snow is bad")).logits[0].softmax(-1)
    assert given == pytest.approx({names[n]: float(p) for n, p in enumerate(wanted)}, abs=1e-5)
    pair = classify({"text": "snow is bad", "text_pair": "coal is good"})
    with torch.no_grad():
        wanted = model(**encode("snow is bad", pair=["coal is good"])).logits[0].softmax(-1)
    assert pair["score"] == pytest.approx(float(wanted.max()), abs=1e-5)


def test_token_classification_labels_every_token(store: Store) -> None:
    names = {0: "O", 1: "B-THING", 2: "B-COLOUR"}
    model = make_model("TokenClassification", num_labels=3, id2label=names)
    model.attach(make_memory(store, model))
    label = pipeline(
        "token-classification", model=model, tokenizer=make_tokenizer(), ignore_labels=[]
    )
    given = label("snow is white")
    with torch.no_grad():
        wanted = model(**encode("snow is white")).logits[0, 1:-1].argmax(-1).tolist()
    assert [one["word"] for one in given] == ["snow", "is", "white"]
    assert [one["entity"] for one in given] == [names[n] for n in wanted]
