"""The model in legacy layout against numbers that the published code itself gave."""

from __future__ import annotations

import pytest
import torch

from model import PlugLMForMaskedLM
from model.published import our_name, our_state
from tests.golden.numbers import NEEDED, RELATIVE, Golden, build, load
from tests.reference.comparison import capture
from tests.reference.worlds import assert_close

pytestmark = NEEDED


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["tiny_m1", "tiny_m1_stale"])
def test_every_number_of_the_published_code(name: str, mode: str) -> None:
    golden = load(name)
    world = build(golden)
    model, memory = world.model.train(mode == "train"), world.memory
    wanted = golden.part(f"{mode}.")
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    output, seen = capture(model, lambda: model(**world.inputs, lookup=memory.lookup))
    model.load_state_dict(statistics, strict=False)

    ids = torch.stack([r.retrieved.ids for r in output.retrievals], 1)
    assert torch.equal(ids, wanted["I"])
    (retrieval,) = output.retrievals
    seen["logits"], seen["layer3.key"] = output.logits, retrieval.key_BKQ
    seen["last_hidden_state"] = seen["layer3.output"]
    values = model.pluglm.encode_entries(retrieved_tokens(retrieval)).values_nJH
    seen["layer3.value"] = values.view(*ids[:, 0].shape, -1)
    seen["layer3.topk_scores"] = (memory.calls[0] @ memory.keys_NQ.T).gather(1, ids[:, 0])

    labelled = model(**world.inputs, labels=world.labels, lookup=memory.lookup)
    seen["loss"] = labelled.loss.reshape(1)
    chosen = world.labels != -1
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


def retrieved_tokens(retrieval: object) -> torch.Tensor:
    """int64 [B·K,S]."""
    tokens: torch.Tensor = retrieval.retrieved.tokens.flatten(0, 1)  # type: ignore[attr-defined]
    return tokens


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


def test_the_stored_vectors_of_the_first_file_are_this_models() -> None:
    golden = load("tiny_m1")
    world = build(golden)
    with torch.no_grad():
        encoded = world.model.eval().pluglm.encode_entries(world.memory.tokens_NS)
    assert_close(encoded.keys_nQ, golden.tensors["keys_float32"], RELATIVE, "keys")
    assert_close(encoded.values_nJH[:, 0], golden.tensors["values_float32"], RELATIVE, "values")


def test_every_published_tensor_has_a_place_and_no_place_is_left() -> None:
    golden = load("tiny_m1")
    assert our_state(golden.state).keys() == build(golden).model.state_dict().keys()
    aliases = golden.about["state_aliases"]
    known = {name for name, _, _ in golden.about["state_dict_keys"]} - set(aliases)
    assert {n for n in known if not n.endswith("position_ids")} == {
        n for n in golden.state if not n.endswith("position_ids")
    }
