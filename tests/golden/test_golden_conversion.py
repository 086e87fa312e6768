"""The published code's own state, as its files: converted, loaded, asked, and written back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from memory_server.local import LocalMemory
from tests.golden.numbers import NEEDED, RELATIVE, Golden, load
from tests.reference.worlds import assert_close
from trainer.convert.published import convert_published
from trainer.convert.to_published import convert_to_published

pytestmark = NEEDED


def as_files(golden: Golden, directory: Path) -> dict[str, torch.Tensor]:
    """Write what the published code has on disk; returns its state with every alias."""
    about = load("tiny_m1").about
    state = {
        name: golden.state[about["state_aliases"].get(name, name)]
        for name, _, _ in about["state_dict_keys"]
    }
    for name, shape, _ in about["state_dict_keys"]:
        state[name] = state[name].reshape(shape)
    torch.save(state, directory / "ckpt.pt")
    (directory / "config.json").write_text(json.dumps({"model_args": golden.about["config"]}))
    for name in ("documents", "keys", "values"):
        np.save(directory / f"{name}.npy", golden.tensors[name].numpy())
    return state


@pytest.mark.parametrize("name", ["tiny_m1", "tiny_m1_stale"])
def test_converted_it_answers_as_the_published_code_and_goes_back(
    tmp_path: Path, name: str
) -> None:
    golden = load(name)
    state = as_files(golden, tmp_path)
    report = convert_published(
        tmp_path / "ckpt.pt",
        tmp_path / "config.json",
        tmp_path / "ours",
        keys=tmp_path / "keys.npy",
        values=tmp_path / "values.npy",
        documents=tmp_path / "documents.npy",
    )
    assert not report.disagreeing
    assert {n.rsplit(".", 1)[1] for n in report.left} == {"position_ids"}

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours" / "model").eval()
    inputs = golden.part("input.")
    del inputs["labels"]
    with LocalMemory(tmp_path / "ours" / "memory", vectors=tmp_path / "ours" / "vectors") as memory:
        model.attach(memory)
        with torch.no_grad():
            output = model(**inputs)
    ids = torch.stack([r.retrieved.ids for r in output.retrievals], 1)
    assert torch.equal(ids, golden.tensors["eval.I"])
    assert_close(output.logits, golden.tensors["eval.logits"], RELATIVE, "logits")

    convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    back = torch.load(tmp_path / "theirs" / "ckpt.pt", weights_only=True)
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        assert tensor.dtype == state[key].dtype, key
        assert torch.equal(tensor, state[key]), key
    for ours, theirs in (("documents", "tokenized"), ("keys", "keys"), ("values", "values")):
        given = (tmp_path / f"{ours}.npy").read_bytes()
        assert (tmp_path / "theirs" / f"{theirs}.npy").read_bytes() == given
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_args"]
    own = ("tokenized_document_path", "return_I")  # of a run, not of the model
    for key, value in golden.about["config"].items():
        assert key in own or settings[key] == value, key
