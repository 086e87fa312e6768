"""A PlugLM that starts from a BERT computes what the BERT does, as far as they have the same parts.

`PLUGLM_MINILM_DIR` may name the directory of a real 6-layer BERT with its tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
    PreTrainedModel,
)

from model import PlugLMForMaskedLM
from tests.trainer.convert.published_files import vocabulary_file
from trainer.convert.bert import MemoryParts, convert_bert
from trainer.convert.bert_source import open_source
from trainer.convert.errors import ConversionError

VOCAB = 40
MINILM = os.environ.get("PLUGLM_MINILM_DIR", "")
KINDS: dict[str, type[PreTrainedModel]] = {
    "base": BertModel,
    "masked LM": BertForMaskedLM,
    "pre-training": BertForPreTraining,
}


def bert(path: Path, kind: type[PreTrainedModel] = BertForMaskedLM, **changes: Any) -> Any:
    """A BERT with random weights, biases and norms too, saved as `transformers` does."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    torch.manual_seed(0)
    source = kind(BertConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.3)
    source.save_pretrained(path)
    return source.eval()


def loaded(path: Path) -> PlugLMForMaskedLM:
    found: Any = AutoModelForMaskedLM.from_pretrained(path, output_loading_info=True)
    model, info = found
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, PlugLMForMaskedLM)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    mask_BT = torch.ones(2, 9, dtype=torch.int64)
    mask_BT[1, 6:] = 0
    return {
        "input_ids": torch.randint(4, VOCAB, (2, 9)) * mask_BT,
        "attention_mask": mask_BT,
        "token_type_ids": torch.randint(0, 2, (2, 9)),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["masked LM", "pre-training"])
def test_without_memory_layers_the_logits_are_berts(
    tmp_path: Path, kind: str, legacy: bool
) -> None:
    source = bert(tmp_path / "bert", KINDS[kind])
    report = convert_bert(
        str(tmp_path / "bert"), tmp_path / "out", parts=MemoryParts(memory_layers=0, legacy=legacy)
    )
    assert not report.made
    inputs = batch()
    with torch.no_grad():
        wanted = source(**inputs)[0]
        given = loaded(tmp_path / "out")(**inputs).logits
    kept = inputs["attention_mask"] > 0
    torch.testing.assert_close(given[kept], wanted[kept], rtol=1e-5, atol=1e-5)


def test_a_decoder_of_its_own_stays_its_own(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert", tie_word_embeddings=False)
    assert "cls.predictions.decoder.weight" in load_file(tmp_path / "bert" / "model.safetensors")
    report = convert_bert(
        str(tmp_path / "bert"), tmp_path / "out", parts=MemoryParts(memory_layers=0)
    )
    assert "head.decoder.weight" in report.taken
    inputs = batch() | {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    with torch.no_grad():
        given = loaded(tmp_path / "out")(**inputs).logits
        torch.testing.assert_close(given, source(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_layers_compute_what_berts_do(tmp_path: Path, kind: str) -> None:
    source = bert(tmp_path / "bert", KINDS[kind])
    report = convert_bert(str(tmp_path / "bert"), tmp_path / "out")
    encoder = loaded(tmp_path / "out").pluglm
    seen: list[torch.Tensor] = []
    encoder.layers[2].attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    inputs = batch() | {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    with torch.no_grad():
        encoder(**inputs)
        wanted = getattr(source, "bert", source)(**inputs, output_hidden_states=True)
    given = seen[0].reshape(2, 9, 16)
    torch.testing.assert_close(given, wanted.hidden_states[2], rtol=1e-5, atol=1e-5)
    made = {name.split(".")[-2] for name in report.made if name.startswith("head.")}
    assert made == ({"head", "dense", "LayerNorm"} if kind == "base" else set())


def test_every_tensor_is_taken_left_or_made(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert", BertForPreTraining)
    report = convert_bert(str(tmp_path / "bert"), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told["taken"] == report.taken
    model = loaded(tmp_path / "out")
    tied = {"head.decoder.weight"}
    assert {*told["taken"], *told["made"]} == model.state_dict().keys() - tied
    stored = load_file(tmp_path / "bert" / "model.safetensors")
    assert {*told["taken"].values(), *told["left"]} == stored.keys()
    assert "cls.seq_relationship.weight" in told["left"]
    assert "bert.encoder.layer.2.intermediate.dense.weight" in told["left"]
    taken = told["taken"]["pluglm.layers.2.LayerNorm.weight"]
    assert taken == "bert.encoder.layer.2.output.LayerNorm.weight"
    for ours, theirs in told["taken"].items():
        assert torch.equal(model.state_dict()[ours], source.state_dict()[theirs]), ours


def test_the_memorys_parts_are_made_as_the_papers_and_by_the_seed(tmp_path: Path) -> None:
    bert(tmp_path / "bert", hidden_size=64, initializer_range=0.05)
    before = torch.random.get_rng_state()
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        report = convert_bert(str(tmp_path / "bert"), out, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (loaded(out).state_dict() for out in outs)
    assert all(torch.equal(first[n], same[n]) for n in first)
    matrices = [first[n] for n in report.made if first[n].ndim == 2]
    assert any(not torch.equal(first[n], other[n]) for n in report.made)
    spread = torch.cat([m.reshape(-1) for m in matrices])
    assert abs(float(spread.std()) - 0.05) < 0.002
    assert abs(float(spread.mean())) < 0.002
    for name in report.made:
        value = first[name]
        if name.endswith((".weight", "running_var", "beta")) and value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        elif value.ndim < 2:
            assert not value.any(), name


def test_the_memorys_parts_are_those_that_were_asked_for(tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    parts = MemoryParts(
        memory_layers=2, key_size=5, memory_ffn_size=0, value_pooling="tokens", query_norm="layer",
        memory_attention="single_head", entry_encoder="first_1", query_pooler="mean",
        memory_init="copy", memory_beta_init=4.0,
    )  # fmt: skip
    convert_bert(str(tmp_path / "bert"), tmp_path / "out", parts=parts)
    model = loaded(tmp_path / "out")
    config = model.config
    assert (config.num_memory_layers, config.key_size, config.memory_ffn_size) == (2, 5, 0)
    assert (config.value_pooling, config.query_norm) == ("tokens", "layer")
    assert (config.entry_encoder, config.entry_encoder_layers) == ("first_n", 1)
    assert torch.equal(model.pluglm.entry_encoder.value_proj.weight, torch.eye(16))
    assert model.pluglm.layers[1].knowledge_attention.beta.tolist() == [4.0]


def old_names(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        : t for n, t in state.items()
    }  # fmt: skip
    assert renamed.keys() != state.keys()
    torch.save(renamed, path / "pytorch_model.bin")


def in_two_files(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: state[n] for n in part}, path / file)
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("change", [old_names, in_two_files])
def test_old_names_pickled_weights_and_several_files_are_read(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    bert(tmp_path / "bert")
    convert_bert(str(tmp_path / "bert"), tmp_path / "plain")
    change(tmp_path / "bert")
    convert_bert(str(tmp_path / "bert"), tmp_path / "out")
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("plain", "out")]
    assert weights[0] == weights[1]


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    vocabulary = vocabulary_file(tmp_path / "vocab.txt", VOCAB).read_text().splitlines()
    BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "bert")
    convert_bert(str(tmp_path / "bert"), tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("WORDA0 wordb1")["input_ids"]
    assert ids == [2, 5, 6, 3]
    assert len(loaded(tmp_path / "out").config.tokenizer_fingerprint) == 32


def without_a_layer(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    kept = {n: t for n, t in state.items() if ".layer.1.attention.self.query." not in n}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def another_shape(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    state["bert.embeddings.LayerNorm.bias"] = torch.ones(17)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "parts", "named"),
    [
        (without_a_layer, {}, r"bert\.encoder\.layer\.1\.attention\.self\.query\.weight is miss"),
        (another_shape, {}, r"embeddings\.LayerNorm\.bias has shape \[17\] instead of \[16\]"),
        (setting(model_type="roberta"), {}, "is a 'roberta' model; give a BERT checkpoint"),
        (setting(model_type="pluglm"), {}, "is a PlugLM already"),
        (setting(hidden_act="relu"), {}, "hidden_act is 'relu'"),
        (setting(position_embedding_type="relative_key"), {}, "position_embedding_type is"),
        (lambda p: (p / "config.json").unlink(), {}, r"holds no config\.json"),
        (lambda p: (p / "model.safetensors").unlink(), {}, "has neither model.safetensors nor"),
        (lambda p: None, {"memory_layers": 4}, "num_memory_layers is 4; allowed: 0 to"),
        (lambda p: None, {"entry_encoder": "last_2"}, "entry_encoder is 'last_2'"),
        (lambda p: None, {"entry_encoder": "first_3"}, "entry_encoder_layers is 3"),
    ],
)
def test_a_source_that_cannot_be_the_start_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], parts: dict[str, Any], named: str
) -> None:
    bert(tmp_path / "bert")
    spoil(tmp_path / "bert")
    with pytest.raises(ConversionError, match=named) as caught:
        convert_bert(str(tmp_path / "bert"), tmp_path / "out", parts=MemoryParts(**parts))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_there_is_not_asked_of_a_hub(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="there is no directory"):
        convert_bert(str(tmp_path / "nothing"), tmp_path / "out")


@pytest.mark.skipif(
    not MINILM or not Path(MINILM).is_dir(), reason="PLUGLM_MINILM_DIR names no directory"
)
def test_a_real_six_layer_bert_with_its_tokenizer(tmp_path: Path) -> None:
    """Its sentences' hidden states, up to the last layer and with all layers plain."""
    convert_bert(MINILM, tmp_path / "out", parts=MemoryParts(memory_layers=0))
    model, source = loaded(tmp_path / "out").pluglm, BertModel.from_pretrained(MINILM).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(MINILM)
    texts = ["Photosynthesis turns light into sugar.", "A short one", "Ünïcode, 漢字 and €5!"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == original(texts, padding=True)["input_ids"]
    with torch.no_grad():
        given = model(**inputs).last_hidden_state
        wanted = source(**inputs).last_hidden_state
    kept = inputs["attention_mask"] > 0
    torch.testing.assert_close(given[kept], wanted[kept], rtol=1e-5, atol=1e-5)
    report = convert_bert(MINILM, tmp_path / "memory")
    assert len(report.taken) == 97
    assert "pooler.dense.weight" in report.left


@pytest.mark.parametrize(
    ("pluglm", "wanted", "kinds"),
    [(True, "BERT or PlugLM", "is 'bert' or 'pluglm'"), (False, "BERT", "is 'bert'")],
)
def test_a_refusal_names_what_its_caller_takes(
    tmp_path: Path, pluglm: bool, wanted: str, kinds: str
) -> None:
    with pytest.raises(ConversionError, match=f"give the directory of a {wanted} checkpoint"):
        open_source(tmp_path, pluglm=pluglm)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConversionError, match=f"give a {wanted} checkpoint: .* {kinds}$"):
        open_source(tmp_path, pluglm=pluglm)
