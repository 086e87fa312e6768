"""What an explanation says is what the model and the memory do."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.config import ConfigError
from cluster.explain.explanation import Explanation
from cluster.explain.measure import explain
from cluster.explain.terminal import describe
from cluster.memory_tools import sentence_tokens
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun, make_tiny_run, save_tiny_model

TEXT = "The [MASK] is an island in the river of [MASK]."
K = 3


@dataclass(frozen=True)
class Opened:
    run: TinyRun
    trained: TrainedModel
    memory: LocalMemory

    def explained(self, text: str = TEXT, k: int = K, answer: str | None = None) -> Explanation:
        store = Store.open(self.run.store)
        return explain(self.trained, self.memory, text, k=k, store=store, answer=answer)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    run = make_tiny_run(tmp_path_factory.mktemp("explained"))
    trained = load_trained_model(run.model)
    return Opened(run, trained, trained.memory(run.store))


def test_predictions_and_readings_are_the_models_own(opened: Opened) -> None:
    told = opened.explained()
    tokens_1T = sentence_tokens(opened.trained, TEXT)
    with torch.no_grad():
        output = opened.trained.model(
            tokens_1T, lookup=lambda q: opened.memory.search(q, K), output_attention=True
        )
    probabilities = output.logits.softmax(-1)
    assert [p.position for p in told.predictions] == [
        t for t, token in enumerate(told.tokens) if token == "[MASK]"
    ]
    for prediction in told.predictions:
        best = probabilities[0, prediction.position].max()
        assert prediction.guesses[0].probability == pytest.approx(float(best), abs=1e-6)
    assert len(told.layers) == 2
    for reading, retrieval in zip(told.layers, output.retrievals, strict=True):
        assert [read.id for read in reading.entries] == retrieval.retrieved.ids[0].tolist()
        heads = torch.tensor([read.attention for read in reading.entries])
        assert heads.shape == (K, 2, len(told.tokens))
        torch.testing.assert_close(heads.sum(0), torch.ones(2, len(told.tokens)))


def test_without_an_entry_it_is_as_a_memory_without_it(opened: Opened, tmp_path: Path) -> None:
    told = opened.explained()
    assert len(told.entries) > K, "the layers read different entries"
    tokens_1T = sentence_tokens(opened.trained, TEXT)
    changed = 0
    for number in range(3):
        place = tmp_path / str(number)
        shutil.copytree(opened.run.store, place)
        Store.open(place).commit(remove_ids=[told.entries[number].id], message="out")
        with opened.trained.memory(place) as smaller, torch.no_grad():
            found = opened.trained.model(tokens_1T, lookup=lambda q, m=smaller: m.search(q, K))
        for mask, prediction in enumerate(told.without[number].predictions):
            row = found.logits[0, prediction.position].softmax(-1)
            assert prediction.guesses[0].probability == pytest.approx(float(row.max()), abs=1e-5)
            first = told.predictions[mask].guesses[0].token
            token = opened.trained.tokenizer.convert_tokens_to_ids(first)
            assert prediction.asked is not None
            assert prediction.asked.token == first
            assert prediction.asked.probability == pytest.approx(float(row[token]), abs=1e-5)
            changed += abs(told.change(number, mask)) > 1e-4
    assert changed, "no entry matters: the test shows nothing"


def test_the_last_one_is_without_any_memory(opened: Opened) -> None:
    told = opened.explained()
    with torch.no_grad():
        plain = opened.trained.model(sentence_tokens(opened.trained, TEXT)).logits.softmax(-1)
    assert told.without[-1].id is None
    assert len(told.without) == len(told.entries) + 1
    for prediction in told.without[-1].predictions:
        best = float(plain[0, prediction.position].max())
        assert prediction.guesses[0].probability == pytest.approx(best, abs=1e-6)


def test_an_answer_is_followed(opened: Opened) -> None:
    told = opened.explained(answer="river")
    for one in (told.predictions, *(without.predictions for without in told.without)):
        assert {p.asked.token for p in one if p.asked is not None} == {"river"}
    shown = describe(told)
    assert "the answer river:" in shown
    assert "without any memory:" in shown
    assert told.entries[0].domain == "default"


def test_ids_beyond_a_browsers_numbers_survive_json(opened: Opened) -> None:
    told = opened.explained()
    again = json.loads(json.dumps(told.as_json()))
    assert again["format"] == "pluglm-explanation-1"
    assert [entry["id"] for entry in again["entries"]] == [entry.id for entry in told.entries]


@pytest.mark.parametrize(
    ("text", "answer", "k", "says"),
    [
        ("No mask at all.", None, K, r"has no \[MASK\]"),
        ("[MASK] " * 40, None, K, "reads at most 30"),
        (TEXT, "unpronounceable", K, "has .* tokens for this model"),
        (TEXT, "龘", K, "the answer '龘' is not in this model's vocabulary"),
        (TEXT, None, 100_000, "k = 100000: must be from 1 to"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    opened: Opened, text: str, answer: str | None, k: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        opened.explained(text, k=k, answer=answer)


def test_a_model_without_memory_reads_nothing(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "plain", tokenizer=opened.run.model, num_memory_layers=0)
    words = ["explain", str(opened.run.store), TEXT, "--model", str(tmp_path / "plain")]
    assert main(words) == 2
    assert "has no memory layer" in capsys.readouterr().err


def test_the_command(opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "why.html"
    assert main(["explain", str(opened.run.run), TEXT, "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["predictions"]) == 2
    assert "<script" in page.read_text(encoding="utf-8")
    for words, says in (
        ([TEXT], "give a STORE or RUN_DIR"),
        ([str(opened.run.store), TEXT], "--model is needed"),
        ([str(opened.run.run), TEXT, "--html", str(tmp_path / "no" / "x.html")], "no directory"),
        ([str(opened.run.run), TEXT, "--html", str(tmp_path)], "is a directory"),
        ([str(opened.run.run), "none"], "has no [MASK]"),
        ([str(opened.run.run), TEXT, "--guesses", "100000"], "guesses = 100000: must be from 1"),
        ([str(opened.run.run), TEXT, "-k", "1000"], "k = 1000: must be from 1"),
    ):
        assert main(["explain", *words]) == 2
        told = capsys.readouterr().err
        assert says in told
        assert "computing the keys" not in told, "refused before any work is done"
