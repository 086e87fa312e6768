"""The model in legacy layout against numbers that the published code itself gave.

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
from tests.golden.published_names import our_name, our_state
from tests.reference.worlds import FlatMemory, assert_close, capture

GOLDEN = os.environ.get("PLUGLM_GOLDEN_DIR", "")
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(
        not GOLDEN or not Path(GOLDEN).is_dir(),
        reason="PLUGLM_GOLDEN_DIR does not name a directory of reference numbers",
    ),
]
RELATIVE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One file's numbers: where the state comes from, the stored keys, what was computed."""

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
    folder = Path(GOLDEN)
    about = json.loads((folder / f"{name}.json").read_text())
    base = load_file(folder / f"{about.get('state_from', name)}.safetensors")
    tensors = {k: v for k, v in base.items() if k.startswith(("input.", "documents", "keys"))}
    tensors |= load_file(folder / f"{name}.safetensors")
    if "second_file" in about:
        tensors |= load_file(folder / about["second_file"])
    state = {k.removeprefix("state."): v for k, v in base.items() if k.startswith("state.")}
    return Golden(about=about, state=state, tensors=tensors)


def build(golden: Golden) -> tuple[PlugLMForMaskedLM, FlatMemory]:
    published = golden.about["config"]
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "hidden_dropout_prob", "attention_probs_dropout_prob",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id",
        "num_memory_layers",
    )  # fmt: skip
    config = PlugLMConfig(
        **{name: published[name] for name in same},
        key_size=published["query_size"],
        memory_ffn_size=published["memory_layer_ffn_dim"],
        memory_attention=published["knowledge_attention_type"],
        query_norm="batch" if published["query_batchnorm"] else "none",
        legacy=True,
    )
    model = PlugLMForMaskedLM(config)
    model.load_state_dict(our_state(golden.state), strict=True)
    tokens = golden.tensors["documents"].long()
    keys = golden.tensors["keys"].float()
    return model, FlatMemory(keys, tokens, torch.arange(len(tokens)), published["memory_k"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["tiny_m1", "tiny_m1_stale"])
def test_every_number_of_the_published_code(name: str, mode: str) -> None:
    golden = load(name)
    model, memory = build(golden)
    model.train(mode == "train")
    wanted, inputs = golden.part(f"{mode}."), golden.part("input.")
    labels = inputs.pop("labels")
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    output, seen = capture(model, lambda: model(**inputs, lookup=memory.lookup))
    model.load_state_dict(statistics, strict=False)

    ids = torch.stack([r.retrieved.ids for r in output.retrievals], 1)
    assert torch.equal(ids, wanted["I"])
    (retrieval,) = output.retrievals
    seen["logits"], seen["layer3.key"] = output.logits, retrieval.key_BKQ
    seen["last_hidden_state"] = seen["layer3.output"]
    _, values, _ = model.pluglm.entry_encoder(retrieval.retrieved.tokens, model.pluglm.embeddings)
    seen["layer3.value"] = values.squeeze(2)
    seen["layer3.topk_scores"] = (memory.calls[0] @ memory.keys_NQ.T).gather(1, ids[:, 0])

    labelled = model(**inputs, labels=labels, lookup=memory.lookup)
    seen["loss"] = labelled.loss.reshape(1)
    chosen = labels != -1
    assert_close(labelled.logits, wanted["logits"][chosen], RELATIVE, "labelled logits")
    compared = {n: v for n, v in wanted.items() if not n.startswith(("grad.", "after.", "I"))}
    assert set(compared) <= set(seen), set(compared) - set(seen)
    for part, value in compared.items():
        assert_close(seen[part], value, RELATIVE, part)

    labelled.loss.backward()
    check_gradients(model, golden, mode)
    after = golden.part("train.after.") if mode == "train" else {}
    for part, value in our_state(after).items():
        given = model.state_dict()[part]
        assert_close(given.float(), value.float(), RELATIVE, part)
    if mode == "eval":
        assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def check_gradients(model: PlugLMForMaskedLM, golden: Golden, mode: str) -> None:
    """The gradients that are stored, value by value; of all others the norm."""
    parameters = dict(model.named_parameters())
    norms = {our_name(name): norm for name, norm in golden.about[mode]["grad_norm"].items()}
    assert norms.keys() == parameters.keys()
    largest = max(norms.values())
    for name, grad in golden.part(f"{mode}.grad.").items():
        given = parameters[our_name(name)].grad
        assert given is not None, name
        assert_close(given, grad, RELATIVE, name, floor=largest * 1e-3)
    for name, norm in norms.items():
        given = parameters[name].grad
        assert given is not None, name
        # A few are zero but for rounding (a key's bias): measured on the whole.
        assert float(given.norm()) == pytest.approx(norm, rel=RELATIVE, abs=largest * 1e-7), name


def test_the_stored_keys_of_the_first_file_are_this_models_keys() -> None:
    golden = load("tiny_m1")
    model, memory = build(golden)
    with torch.no_grad():
        keys, values, _ = model.eval().pluglm.entry_encoder(
            memory.tokens_NS, model.pluglm.embeddings
        )
    assert_close(keys, golden.tensors["keys_float32"], RELATIVE, "keys")
    assert_close(values[:, 0], golden.tensors["values_float32"], RELATIVE, "values")


def test_every_published_tensor_has_a_place_and_no_place_is_left() -> None:
    golden = load("tiny_m1")
    model, _ = build(golden)
    assert our_state(golden.state).keys() == model.state_dict().keys()
    aliases = golden.about["state_aliases"]
    known = {name for name, _, _ in golden.about["state_dict_keys"]} - set(aliases)
    assert {n for n in known if not n.endswith("position_ids")} == {
        n for n in golden.state if not n.endswith("position_ids")
    }
