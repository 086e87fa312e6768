"""Held-out sentences: what was masked, guessed and read; and the report that shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.small_world import SmallWorld, small_world
from trainer.evaluate import evaluation_report
from trainer.export import write_json
from trainer.report import write_report
from trainer.samples import make_samples
from trainer.world.tokenizer import PAD, TOKEN_IDS

K = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallWorld]:
    with small_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def test_a_sample_says_what_was_hidden_and_what_was_guessed(world: SmallWorld) -> None:
    batch = world.batch(slice(0, 5))
    samples = make_samples(world.model, world.memory, world.tokenizer, batch, k=K)
    assert len(samples) == 5
    world.model.eval()
    with torch.no_grad():
        read = world.model(
            batch.input_ids, batch.attention_mask, lookup=lambda q: world.memory.search(q, K)
        ).logits
        unread = world.model(batch.input_ids, batch.attention_mask).logits
    for row, (sample, fact) in enumerate(zip(samples, world.facts, strict=False)):
        assert sample["text"] == fact.text
        assert sample["tokens"] == ["[CLS]", *fact.words, "[SEP]"]
        (mask,) = sample["masked"]
        assert (mask["position"], mask["truth"]) == (4, fact.thing)
        for key, logits in (("predictions", read), ("predictions_without_memory", unread)):
            best = torch.softmax(logits[row, 4], -1).topk(3)
            assert [p["probability"] for p in mask[key]] == pytest.approx(best.values.tolist())
            assert [TOKEN_IDS[p["token"]] for p in mask[key]] == best.indices.tolist()


def test_a_sample_says_which_entries_each_layer_read(world: SmallWorld) -> None:
    batch = world.batch(slice(0, 5))
    samples = make_samples(world.model, world.memory, world.tokenizer, batch, k=K)
    texts = {fact.id: fact.text for fact in world.facts}
    for sample, fact in zip(samples, world.facts, strict=False):
        assert [layer["layer"] for layer in sample["layers"]] == [1, 2]
        for layer in sample["layers"]:
            entries = layer["entries"]
            assert len(entries) == K
            scores = [entry["score"] for entry in entries]
            assert scores == sorted(scores, reverse=True)
            assert sum(entry["weight"] for entry in entries) == pytest.approx(1.0, abs=1e-5)
            for entry in entries:
                assert entry["text"] == texts[entry["id"]]
                assert entry["own_document"] is (entry["id"] == fact.id)
                assert entry["source"] == "synthetic world"
                assert entry["title"] == entry["text"].split()[0]


def test_places_without_an_entry_are_left_out(world: SmallWorld) -> None:
    batch = world.batch(slice(0, 2))
    (sample, _) = make_samples(world.model, world.memory, world.tokenizer, batch, k=30)
    assert len(sample["layers"][0]["entries"]) == len(world.facts)


def test_padding_is_not_shown(world: SmallWorld) -> None:
    batch = world.batch(slice(0, 2))
    padded = replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 2), value=PAD),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 2)),
        labels=torch.nn.functional.pad(batch.labels, (0, 2), value=-100),
    )
    short = make_samples(world.model, world.memory, world.tokenizer, batch, k=K)
    long = make_samples(world.model, world.memory, world.tokenizer, padded, k=K)
    assert [s["tokens"] for s in long] == [s["tokens"] for s in short]


def test_attention_over_the_whole_sentence_has_weights_too(tmp_path: Path) -> None:
    options = {"memory_attention": "sentence_level", "value_pooling": "separate"}
    with small_world(tmp_path, **options) as world:
        batch = world.batch(slice(0, 2))
        samples = make_samples(world.model, world.memory, world.tokenizer, batch, k=K)
    for layer in samples[0]["layers"]:
        assert sum(entry["weight"] for entry in layer["entries"]) == pytest.approx(1.0, abs=1e-5)


def test_the_report_shows_what_was_written(world: SmallWorld, tmp_path: Path) -> None:
    batch = world.batch(slice(0, 3))
    samples = make_samples(world.model, world.memory, world.tokenizer, batch, k=K)
    write_json(tmp_path / "samples.json", samples)
    evaluation = evaluation_report(world.model, world.memory, lambda: iter([batch]), k=K)
    write_json(tmp_path / "evaluation.json", evaluation)
    assert json.loads((tmp_path / "samples.json").read_text()) == samples
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for part in ("Sentence 3", "own document", "Entries read by layer 2", "synthetic world"):
        assert part in page
    for fact in world.facts[:3]:
        assert fact.thing in page
    assert "not recorded" not in page
    assert "No entry was read" not in page
