"""Auto classes, saving and loading, precisions, copies: what transformers users do first."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import model as pluglm
from memory_server.store.store import Store
from tests.ecosystem.colours import encode, fact, make_memory, make_model, make_tokenizer

AUTO: dict[str, Any] = {
    "": AutoModel,
    "MaskedLM": AutoModelForMaskedLM,
    "SequenceClassification": AutoModelForSequenceClassification,
    "TokenClassification": AutoModelForTokenClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
}
ASKED = fact("apple", "[MASK]")


def answer(model: Any) -> torch.Tensor:
    output = model(**encode(ASKED, "snow is white"))
    return output[0].detach()


@pytest.mark.parametrize("head", AUTO)
def test_every_class_comes_back_from_its_directory(head: str, tmp_path: Path, store: Store) -> None:
    made = make_model(head, num_labels=3, id2label={0: "no", 1: "yes", 2: "perhaps"})
    made.save_pretrained(tmp_path / "m")
    loaded, report = AUTO[head].from_pretrained(tmp_path / "m", output_loading_info=True)
    assert type(loaded) is type(made)
    assert not any(report.values()), report
    assert not loaded.training
    assert AutoConfig.from_pretrained(tmp_path / "m").id2label == {0: "no", 1: "yes", 2: "perhaps"}
    architectures = json.loads((tmp_path / "m" / "config.json").read_text())["architectures"]
    assert architectures == [type(made).__name__]
    memory = make_memory(store, made)
    for one in (made, loaded):
        one.attach(memory)
    assert torch.equal(answer(made), answer(loaded))


def test_the_tokenizer_comes_back_from_the_models_directory(reader_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reader_dir)
    assert tokenizer.is_fast
    assert tokenizer(ASKED)["input_ids"] == make_tokenizer()(ASKED)["input_ids"]


def test_heads_take_the_body_of_a_masked_lm_and_give_it_back(
    reader_dir: Path, tmp_path: Path
) -> None:
    source = AutoModelForMaskedLM.from_pretrained(reader_dir)
    wanted = source.pluglm.state_dict()
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        model, report = AUTO[head].from_pretrained(reader_dir, output_loading_info=True)
        made = {name for name in model.state_dict() if name.startswith("head.")}
        assert set(report["missing_keys"]) == made
        assert all(name.startswith("head.") for name in report["unexpected_keys"])
        assert not report["mismatched_keys"]
        taken = model.pluglm.state_dict()
        assert all(torch.equal(taken[name], value) for name, value in wanted.items())
        model.save_pretrained(tmp_path / head)
        back, report = AutoModelForMaskedLM.from_pretrained(
            tmp_path / head, output_loading_info=True
        )
        assert all(name.startswith("head.") for name in report["missing_keys"])
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
        taken = back.pluglm.state_dict()
        assert all(torch.equal(taken[name], value) for name, value in wanted.items())


def test_large_models_are_saved_in_shards(quiet: Any, tmp_path: Path) -> None:
    quiet.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in shards} == set(index["weight_map"].values())
    # A tied matrix is stored once.
    assert "head.decoder.weight" not in index["weight_map"]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded.attach(None)
    assert torch.equal(answer(quiet), answer(loaded))


def test_a_lower_precision_is_loaded_and_reads_the_memory(reader_dir: Path, store: Store) -> None:
    exact = AutoModelForMaskedLM.from_pretrained(reader_dir)
    memory = make_memory(store, exact)
    exact.attach(memory)
    small = AutoModelForMaskedLM.from_pretrained(reader_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    cast = copy.deepcopy(exact).to(torch.bfloat16)
    half, double = copy.deepcopy(exact).half(), copy.deepcopy(exact).double()
    small.attach(memory)
    for model, tolerance in ((small, 0.5), (cast, 0.5), (half, 0.1), (double, 1e-4)):
        given = answer(model)
        assert given.dtype == model.dtype
        assert model.config.dtype == model.dtype or model is not small
        torch.testing.assert_close(given.float(), answer(exact), atol=tolerance, rtol=0)
    word = make_tokenizer().convert_tokens_to_ids("red")
    assert answer(small)[0, encode(ASKED)["input_ids"][0] == 4].argmax() == word


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_keeps_the_tie(tied: bool, tmp_path: Path) -> None:
    model = make_model() if tied else make_model(legacy=True, value_pooling="shared")
    model.attach(None)
    before = answer(model)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 5)
    assert model.config.vocab_size == size + 5
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same is tied
    after = answer(model)
    assert after.shape[-1] == size + 5
    torch.testing.assert_close(after[..., :size], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded.attach(None)
    assert torch.equal(answer(loaded), after)


def test_parameters_are_counted_and_embeddings_are_found(quiet: Any) -> None:
    counted = {p.data_ptr(): p.numel() for p in quiet.parameters()}
    assert quiet.num_parameters() == sum(counted.values())
    assert quiet.get_input_embeddings() is quiet.pluglm.embeddings.word_embeddings
    assert quiet.base_model is quiet.pluglm
    assert quiet.base_model_prefix == "pluglm"
    embedding = torch.nn.Embedding(quiet.config.vocab_size, quiet.config.hidden_size)
    quiet.set_input_embeddings(embedding)
    assert quiet.pluglm.embeddings.word_embeddings is embedding


def test_a_copy_shares_the_memory_and_a_pickle_leaves_it_out(store: Store) -> None:
    model = make_model()
    model.attach(make_memory(store, model))
    assert copy.copy(model).has_memory
    copied = copy.deepcopy(model)
    assert copied.has_memory
    assert torch.equal(answer(copied), answer(model))
    with torch.no_grad():
        copied.pluglm.embeddings.word_embeddings.weight.zero_()
    assert not torch.equal(answer(copied), answer(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert not loaded.has_memory
        model.detach()
        loaded.detach()
        assert torch.equal(answer(loaded), answer(model))


def test_what_is_saved_is_weights_and_says_nothing_of_the_memory(
    store: Store, tmp_path: Path
) -> None:
    model = make_model()
    model.attach(make_memory(store, model))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "config.json",
        "model.safetensors",
    ]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(model.state_dict()) - {"head.decoder.weight"}
    assert not AutoModelForMaskedLM.from_pretrained(tmp_path).has_memory


def test_every_class_is_exported() -> None:
    assert all(hasattr(pluglm, f"PlugLMFor{head}") for head in AUTO if head)
