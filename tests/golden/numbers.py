"""The reference numbers of the published code, and a model and a memory made of them.

`PLUGLM_GOLDEN_DIR` names the directory that holds them; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM
from model.published import our_state
from model.published_config import config_from_published
from tests.reference.worlds import FlatMemory, World

FOLDER = os.environ.get("PLUGLM_GOLDEN_DIR", "")
NEEDED = [
    pytest.mark.golden,
    pytest.mark.skipif(
        not FOLDER or not Path(FOLDER).is_dir(),
        reason="PLUGLM_GOLDEN_DIR does not name a directory of reference numbers",
    ),
]
RELATIVE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One file's numbers: where the state comes from, the stored vectors, what was computed."""

    about: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }


def load(name: str) -> Golden:
    folder = Path(FOLDER)
    about = json.loads((folder / f"{name}.json").read_text())
    base = load_file(folder / f"{about.get('state_from', name)}.safetensors")
    stored = ("input.", "documents", "keys", "values")
    tensors = {k: v for k, v in base.items() if k.startswith(stored)}
    tensors |= load_file(folder / f"{name}.safetensors")
    if "second_file" in about:
        tensors |= load_file(folder / about["second_file"])
    state = {k.removeprefix("state."): v for k, v in base.items() if k.startswith("state.")}
    return Golden(about=about, state=state, tensors=tensors)


def build(golden: Golden, **fixed: bool) -> World:
    """The model of a file (with `fixed_keys`, `fixed_values`), its inputs and its memory."""
    settings = config_from_published(golden.about["config"]).to_dict() | fixed
    model = PlugLMForMaskedLM(PlugLMConfig.from_dict(settings))
    model.load_state_dict(our_state(golden.state), strict=True)
    tokens = golden.tensors["documents"].long()
    memory = FlatMemory(
        golden.tensors["keys"].float(),
        tokens,
        torch.arange(len(tokens)),
        golden.about["config"]["memory_k"],
        golden.tensors["values"][:, None],
    )
    inputs = golden.part("input.")
    labels = inputs.pop("labels")
    order = ("input_ids", "attention_mask", "token_type_ids")
    return World(
        model=model,
        inputs={name: inputs[name].long() for name in order},
        labels=labels,
        memory=memory,
        task="masked_lm",
        targets={"labels": labels},
    )
