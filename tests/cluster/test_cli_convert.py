"""`pluglm convert`, as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from cluster.cli import main
from tests.trainer.convert.published_files import ENTRIES, published_files, vocabulary_file
from tests.trainer.convert.test_files import Trap

Capture = pytest.CaptureFixture[str]


def error_of(words: list[str], capsys: Capture) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(words) == 2
    printed, err = capsys.readouterr()
    assert not printed
    line = err.splitlines()[-1]
    assert line.startswith("pluglm: error: ")
    assert "Traceback" not in err
    return line


def test_published_and_back(tmp_path: Path, capsys: Capture) -> None:
    files = published_files(tmp_path / "given")
    words = ["convert", "published", str(files.checkpoint), "--config", str(files.config)]
    for option, path in files.arrays().items():
        words += [f"--{option}", str(path)]
    words += ["--tokenizer", str(vocabulary_file(tmp_path / "vocab.txt"))]
    assert main([*words, "--out", str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert "pluglm.layers.0-2.ffn.dense_in" in printed
    assert "cls.seq_relationship" in printed
    assert 'memory_pooler_type = "attentive"' in printed
    assert "num_memory_layers =" not in printed
    assert str(tmp_path / "ours" / "model") in printed
    assert main(["memory", "info", str(tmp_path / "ours" / "memory")]) == 0
    assert str(ENTRIES) in capsys.readouterr().out
    # The model and its memory know that they belong together.
    search = ["memory", "search", str(tmp_path / "ours" / "memory"), "worda0 [MASK]"]
    assert main([*search, "--model", str(tmp_path / "ours" / "model")]) == 0

    back = ["convert", "to-published", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs")]
    capsys.readouterr()
    assert main(back) == 0
    assert "ckpt.pt, config.json, keys.npy, tokenized.npy, values.npy" in capsys.readouterr().out
    assert (tmp_path / "theirs" / "keys.npy").read_bytes() == files.keys.read_bytes()
    assert "exists and is not empty" in error_of(back, capsys)


def test_a_checkpoint_with_code_is_one_line_and_is_not_run(tmp_path: Path, capsys: Capture) -> None:
    files = published_files(tmp_path / "given")
    torch.save({"weight": Trap(tmp_path / "sprung")}, files.checkpoint)
    words = ["convert", "published", str(files.checkpoint), "--config", str(files.config)]
    line = error_of([*words, "--out", str(tmp_path / "out")], capsys)
    assert str(files.checkpoint) in line
    assert "holds code" in line
    assert "pathlib" in line
    assert "Nothing of it was run" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given"]


def test_a_memory_of_another_key_width_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    files = published_files(tmp_path / "given")
    np.save(files.keys, np.ones((ENTRIES, 7), dtype=np.float16))
    words = ["convert", "published", str(files.checkpoint), "--config", str(files.config)]
    words += ["--documents", str(files.documents), "--keys", str(files.keys)]
    assert "query_size is 4" in error_of([*words, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_bert(tmp_path: Path, capsys: Capture) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=4)).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    words = ["convert", "bert", str(tmp_path / "bert"), "--out", str(out)]
    options = ["--memory-layers", "2", "--key-size", "6", "--memory-ffn-size", "0"]
    options += ["--value-pooling", "tokens", "--query-norm", "layer", "--seed", "3"]
    options += ["--entry-encoder", "first_2", "--memory-init", "copy"]
    assert main([*words, *options]) == 0
    printed = capsys.readouterr().out
    assert "pluglm.layers.0-3.attention.query" in printed
    assert "bert.encoder.layer.2-3.intermediate.dense" in printed
    assert "pluglm.layers.2-3.query_proj" in printed
    settings = json.loads((out / "config.json").read_text())
    assert (settings["num_memory_layers"], settings["key_size"]) == (2, 6)
    assert (settings["memory_ffn_size"], settings["entry_encoder_layers"]) == (0, 2)
    assert "is a PlugLM already" in error_of(
        ["convert", "bert", str(out), "--out", str(tmp_path / "twice")], capsys
    )
    assert "--value-pooling" in error_of([*words, "--value-pooling", "some"], capsys)
    assert "-1" in error_of([*words, "--memory-layers", "-1"], capsys)
