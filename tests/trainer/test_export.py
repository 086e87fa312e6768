"""A model is exported whole or not at all, and loads as `transformers` loads any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.trainer.small_world import SmallWorld, small_world
from trainer.export import export_model, write_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallWorld]:
    with small_world(tmp_path_factory.mktemp("world")) as made:
        made.model.eval()
        yield made


def test_an_exported_model_computes_the_same(world: SmallWorld, tmp_path: Path) -> None:
    path = export_model(world.model, world.tokenizer, tmp_path)
    assert path == tmp_path / "model"
    loaded = AutoModelForMaskedLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    fact = world.facts[0]
    inputs = tokenizer([fact.question], return_tensors="pt")
    assert inputs["input_ids"].tolist() == world.batch(slice(0, 1)).input_ids.tolist()
    with torch.no_grad():
        given = loaded(inputs["input_ids"], lookup=lambda q: world.memory.search(q, 3)).logits
        wanted = world.model(inputs["input_ids"], lookup=lambda q: world.memory.search(q, 3)).logits
    torch.testing.assert_close(given, wanted)


class TornTokenizer:
    """The disk is full when the tokenizer is written."""

    def save_pretrained(self, path: Path) -> None:
        raise OSError("no space left on device")


def test_an_export_that_fails_leaves_the_one_before(world: SmallWorld, tmp_path: Path) -> None:
    export_model(world.model, world.tokenizer, tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    with pytest.raises(OSError, match="no space left"):
        export_model(world.model, TornTokenizer(), tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_an_export_replaces_the_one_before_and_leaves_nothing_beside(
    world: SmallWorld, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.txt").write_text("old")
    (tmp_path / ".writing-model").mkdir()
    (tmp_path / ".writing-model" / "torn.txt").write_text("half of one")
    export_model(world.model, world.tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"stale.txt", "torn.txt"}


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"title": "Zürich", "n": 1})
    assert "Zürich" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"unwritable": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "Zürich", "n": 1}
    assert list(tmp_path.iterdir()) == [path]
