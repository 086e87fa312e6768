"""Plain BERT pre-trained on text: the baselines of a comparison, made by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, TrainingArguments

from cluster.cli import main
from tests.cluster.memory_support import Capture, refusal
from tests.trainer.finetune.tiny import FRUIT, PETS, make_tokenizer, save_bert, save_pluglm
from trainer.finetune.plain_bert import MaskedTrainer, TokenSequences


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plain")
    save_pluglm(home / "pluglm")
    save_bert(home / "bert")
    # The first noun decides all that follows, so that there is something to learn.
    lines = [f"the {noun} is here in rome the {noun} is here" for noun in [*PETS, *FRUIT]]
    (home / "text.txt").write_text("\n\n".join(lines * 8), encoding="utf-8")
    (home / "empty.txt").write_text(" \n\n", encoding="utf-8")
    return home


def loss(path: Path) -> float:
    """Of the words "the" in a fixed sentence."""
    model: Any = AutoModelForMaskedLM.from_pretrained(path).eval()
    tokens = make_tokenizer()("the cat is here in rome the cat is here", return_tensors="pt")
    ids = tokens["input_ids"]
    labels = torch.where(ids == ids[0, 1], ids, -100)
    masked = torch.where(labels == -100, ids, torch.tensor(4))
    with torch.no_grad():
        return float(model(masked, labels=labels).loss)


def test_going_on_learns_the_text_and_leaves_the_start_as_it_was(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = (home / "bert" / "model.safetensors").read_bytes()
    out = tmp_path / "runs" / "dapt"
    words = ["adapt", "baseline", str(home / "text.txt"), "--from", str(home / "bert")]
    settings = ["--steps", "60", "--batch-size", "8", "--sequence-length", "16", "--lr", "5e-3"]
    assert main([*words, *settings, "--out", str(out)]) == 0
    assert "60 steps in " in capsys.readouterr().out
    assert (home / "bert" / "model.safetensors").read_bytes() == before
    assert loss(out) < loss(home / "bert") / 3
    told = json.loads((out / "baseline.json").read_text(encoding="utf-8"))
    assert (told["steps"], told["sequences"], told["tokens"]) == (60, 64, 640)
    assert told["losses"][-1]["loss"] < told["losses"][0]["loss"]
    assert not list(out.parent.glob(".*"))
    said = refusal([*words, *settings, "--out", str(out)], capsys)
    assert "is there already; choose another --out" in said


def test_plain_bert_of_a_pluglms_size_begins_from_the_seed(home: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> Any:
        words = ["adapt", "baseline", str(home / "text.txt"), "--like", str(home / "pluglm")]
        words += ["--steps", "1", "--batch-size", "2", "--sequence-length", "16"]
        assert main([*words, "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
        return BertForMaskedLM.from_pretrained(tmp_path / name)

    first, again, other = made("a", 3), made("b", 3), made("c", 4)
    assert first.config.hidden_size == 32
    assert first.config.num_hidden_layers == 2
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_at_the_masks_is_the_models_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=50, intermediate_size=32, **shape)).eval()
    ids_BT = torch.randint(1, 50, (3, 7))
    labels_BT = ids_BT.masked_fill(torch.rand(3, 7) > 0.4, -100)
    attended_BT = torch.ones_like(ids_BT)
    attended_BT[1, 5:], labels_BT[1, 5:] = 0, -100
    inputs = {"input_ids": ids_BT, "attention_mask": attended_BT, "labels": labels_BT}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    ours = MaskedTrainer(model=model, args=arguments).compute_loss(model, dict(inputs))
    gradient = torch.autograd.grad(ours, model.bert.embeddings.word_embeddings.weight)[0]
    theirs = model(**inputs).loss
    expected = torch.autograd.grad(theirs, model.bert.embeddings.word_embeddings.weight)[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)


def test_long_texts_are_cut_at_words() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.no_truncation()
    rows = TokenSequences(["the cats is here in rome", "", "fig"], tokenizer, 5)
    pieces = [
        tokenizer.convert_ids_to_tokens(row["input_ids"])
        for row in (rows[i] for i in range(len(rows)))
    ]
    assert pieces == [
        ["[CLS]", "the", "cat", "##s", "[SEP]"],
        ["[CLS]", "is", "here", "in", "[SEP]"],
        ["[CLS]", "rome", "[SEP]"],
        ["[CLS]", "fig", "[SEP]"],
    ]
    assert rows.tokens == 8


def test_what_cannot_be_trained_is_refused(home: Path, tmp_path: Path, capsys: Capture) -> None:
    text, out = str(home / "text.txt"), ["--out", str(tmp_path / "out"), "--steps", "1"]
    bert, plug = ["--from", str(home / "bert")], ["--like", str(home / "pluglm")]
    for words, said in (
        ([text, *out], "give either --from"),
        ([text, *out, *bert, *plug], "give either --from"),
        ([text, *out, "--from", str(home / "pluglm")], "is a PlugLM with memory layers"),
        ([text, *out, "--like", str(home / "bert")], "is a bert model, no PlugLM"),
        ([text, *out, "--from", str(home / "none")], "there is no model at"),
        ([text, *out, *bert], "--sequence-length 128: must be at most 40"),
        ([text, *out, *bert, "--sequence-length", "2"], "must be at least 3"),
        ([text, *out, *bert, "--lr", "2"], "is no learning rate"),
        ([str(home / "empty.txt"), *out, *bert, "--sequence-length", "9"], "there is no text"),
        ([str(home / "none.txt"), *out, *bert, "--sequence-length", "9"], "none.txt"),
    ):
        assert said in refusal(["adapt", "baseline", *words], capsys), said
        assert not list(tmp_path.iterdir())
