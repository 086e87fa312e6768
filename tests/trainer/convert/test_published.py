"""Published files in, the same files out, and every bad one refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from memory_server.keys.stored_vectors import StoredVectors
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import PlugLMConfig, PlugLMForMaskedLM
from tests.trainer.convert.published_files import (
    ENTRIES,
    SETTINGS,
    TOKENS,
    VOCAB,
    PublishedFiles,
    published_files,
    random_state,
    vocabulary_file,
)
from trainer.convert.errors import ConversionError
from trainer.convert.files import load_tensors, save_tensors
from trainer.convert.published import convert_published
from trainer.convert.to_published import convert_to_published
from trainer.corpus.tokenizer import tokenizer_fingerprint


def convert(files: PublishedFiles, out: Path, **changes: Any) -> Any:
    return convert_published(files.checkpoint, files.config, out, **(files.arrays() | changes))


@pytest.fixture
def files(tmp_path: Path) -> PublishedFiles:
    return published_files(tmp_path / "given")


def test_a_checkpoint_with_its_memory_becomes_a_model_a_store_and_vectors(
    files: PublishedFiles, tmp_path: Path
) -> None:
    vocabulary = vocabulary_file(tmp_path / "vocab.txt")
    report = convert(files, tmp_path / "out", tokenizer=vocabulary)
    loaded: Any = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, PlugLMForMaskedLM)
    assert model.config.legacy
    assert model.config.top_k == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)

    documents = np.load(files.documents)
    with LocalMemory(tmp_path / "out" / "memory", vectors=tmp_path / "out" / "vectors") as memory:
        entry = memory.entries([3])[0]
        assert entry.doc_id == 3
        assert entry.tokens == tuple(documents[3])
        assert entry.text == " ".join(tokenizer.convert_ids_to_tokens(documents[3][:4]))
        assert memory.info().tokenizer_fingerprint == model.config.tokenizer_fingerprint
        model.attach(memory)
        with torch.no_grad():
            output = model.eval()(torch.randint(5, VOCAB, (2, 9)))
        assert output.retrievals[0].retrieved.ids.shape == (2, 3)
    vectors = StoredVectors.open(tmp_path / "out" / "vectors")
    assert vectors.values_NJH is not None
    assert vectors.keys_NQ.tobytes() == np.load(files.keys).tobytes()
    assert vectors.values_NJH.tobytes() == np.load(files.values).tobytes()

    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told["taken"] == report.taken
    assert told["taken"]["pluglm.layers.2.ffn.dense_in.bias"] == "bert.encoder.layer.2.ffn.0.bias"
    assert "cls.seq_relationship.weight" in told["left"]
    assert "bert.embeddings.position_ids" in told["left"]
    assert told["memory"]["entries"] == ENTRIES
    # The keys are random numbers here.
    (note,) = told["notes"]
    assert "unlike those that the model makes" in note


def test_keys_that_the_model_made_are_known_as_its_own(
    files: PublishedFiles, tmp_path: Path
) -> None:
    convert(files, tmp_path / "first")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "first" / "model").eval()
    with torch.no_grad():
        keys = model.pluglm.entry_keys(torch.from_numpy(np.load(files.documents)).long())
    np.save(files.keys, keys.half().numpy())
    report = convert(files, tmp_path / "out")
    assert report.memory["likeness"] > 0.999
    assert not any("unlike" in note for note in report.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_memory_layers": 2, "memory_layer_ffn_dim": 0, "query_batchnorm": False},
        {"knowledge_attention_type": "sentence_level", "document_encoder_pooler_type": "max"},
    ],
)
def test_a_round_trip_gives_every_tensor_and_array_back(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    files = published_files(tmp_path / "given", **changes)
    convert(files, tmp_path / "ours")
    convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    given = torch.load(files.checkpoint, weights_only=True)
    back = torch.load(tmp_path / "theirs" / "ckpt.pt", weights_only=True)
    assert back.keys() == given.keys()
    for name, tensor in back.items():
        assert tensor.dtype == given[name].dtype
        assert torch.equal(tensor, given[name]), name
    for path, name in ((files.documents, "tokenized"), (files.keys, "keys"),
                       (files.values, "values")):  # fmt: skip
        assert (tmp_path / "theirs" / f"{name}.npy").read_bytes() == path.read_bytes()
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_args"]
    assert settings == settings | SETTINGS | changes
    assert settings["tokenized_document_path"] == str(tmp_path / "theirs" / "tokenized.npy")
    # And once more, from what was written back.
    again = PublishedFiles(
        checkpoint=tmp_path / "theirs" / "ckpt.pt",
        config=tmp_path / "theirs" / "config.json",
        documents=tmp_path / "theirs" / "tokenized.npy",
        keys=tmp_path / "theirs" / "keys.npy",
        values=tmp_path / "theirs" / "values.npy",
    )
    convert(again, tmp_path / "again")
    weights = [tmp_path / d / "model" / "model.safetensors" for d in ("ours", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_half_precision_weights_stay_half_precision(files: PublishedFiles, tmp_path: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in random_state().items()}
    torch.save(state, files.checkpoint, _use_new_zipfile_serialization=False)
    convert(files, tmp_path / "ours")
    convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    back = torch.load(tmp_path / "theirs" / "ckpt.pt", weights_only=True)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in state.items())


def test_documents_alone_make_a_store_and_no_array_makes_a_model(
    files: PublishedFiles, tmp_path: Path
) -> None:
    report = convert(files, tmp_path / "store", keys=None, values=None)
    assert Store.open(tmp_path / "store" / "memory").manifest().entries == ENTRIES
    assert not (tmp_path / "store" / "vectors").exists()
    assert any("no tokenizer was given" in note for note in report.notes)
    convert(files, tmp_path / "model", keys=None, values=None, documents=None)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "conversion.json", "left.safetensors", "model",
    ]  # fmt: skip
    convert_to_published(tmp_path / "model" / "model", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["ckpt.pt", "config.json"]


def test_fixed_vectors_need_no_projection_and_read_what_is_stored(tmp_path: Path) -> None:
    files = published_files(tmp_path / "given", fix_keys=True, fix_values=True)
    state = torch.load(files.checkpoint, weights_only=True)
    for name in [n for n in state if "retriever." in n]:
        del state[name]
    torch.save(state, files.checkpoint)
    report = convert(files, tmp_path / "ours")
    assert "pluglm.entry_encoder.value_proj.weight" in report.made
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours" / "model").eval()
    ids_BT = torch.randint(5, VOCAB, (2, 9))
    outputs = []
    for name in ("vectors", "doubled"):
        vectors = StoredVectors.open(tmp_path / "ours" / "vectors")
        if name == "doubled":
            assert vectors.values_NJH is not None
            doubled = vectors.values_NJH * np.float16(2)
            StoredVectors.write(tmp_path / name, vectors.ids_N, vectors.keys_NQ, doubled)
            vectors = StoredVectors.open(tmp_path / name)
        with LocalMemory(tmp_path / "ours" / "memory", vectors=vectors) as memory:
            model.attach(memory)
            with torch.no_grad():
                outputs.append(model(ids_BT).logits)
    assert not torch.allclose(*outputs)
    convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    back = torch.load(tmp_path / "theirs" / "ckpt.pt", weights_only=True)
    assert back.keys() == state.keys()


def test_settings_that_were_taken_by_default_are_in_the_report(
    files: PublishedFiles, tmp_path: Path
) -> None:
    raw = json.loads(files.config.read_text())
    del raw["model_args"]["memory_k"]
    files.config.write_text(json.dumps(raw))
    report = convert(files, tmp_path / "out")
    assert report.defaults["memory_k"] == 5
    assert report.defaults["knowledge_attention_type"] == "multi_head"
    assert not report.defaults.keys() & raw["model_args"].keys()
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert written["defaults"] == report.defaults


def test_copies_that_disagree_are_told(files: PublishedFiles, tmp_path: Path) -> None:
    state = random_state()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.decoder.bias"] + 1
    torch.save(state, files.checkpoint)
    report = convert(files, tmp_path / "out")
    assert report.disagreeing == ("cls.predictions.bias",)
    assert any("loaded last" in note for note in report.notes)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(model.head.decoder_bias, state["cls.predictions.decoder.bias"])


def changed(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def with_value(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array[row, 2] = value
    return array


BAD: dict[str, tuple[Callable[[PublishedFiles], object], str]] = {
    "missing tensor": (
        lambda f: torch.save(
            {n: t for n, t in random_state().items() if "query_proj.bias" not in n}, f.checkpoint
        ),
        r"ckpt_8000\.pt does not fit .*1 missing: bert\.encoder\.layer\.2\.memory_layer\.query_proj"
        r"\.bias",
    ),
    "extra tensor": (
        lambda f: torch.save(random_state() | {"bert.new.weight": torch.ones(2)}, f.checkpoint),
        r"1 not known .*: bert\.new\.weight",
    ),
    "another size": (
        lambda f: f.config.write_text(json.dumps(SETTINGS | {"hidden_size": 16})),
        r"of another shape or type: .* and \d+ more",
    ),
    "another model": (
        lambda f: f.config.write_text(json.dumps({"model_args": {"d_model": 16}})),
        r"config\.json: holds no settings of a published model",
    ),
    "no JSON": (lambda f: f.config.write_text("{"), r"config\.json is no JSON file"),
    "no file": (lambda f: f.keys.unlink(), r"there is no array .*keys\.npy"),
    "a list": (lambda f: torch.save([1], f.checkpoint), r"holds a list, not names and tensors"),
    "a run's state": (
        lambda f: torch.save({"model": random_state()}, f.checkpoint),
        r"holds dict under 'model', not a tensor",
    ),
    "truncated": (
        lambda f: f.checkpoint.write_bytes(f.checkpoint.read_bytes()[:5000]),
        r"ckpt_8000\.pt is damaged",
    ),
    "no checkpoint": (
        lambda f: f.checkpoint.write_text("hello\n"),
        r"ckpt_8000\.pt is not a checkpoint",
    ),
    "id beyond": (
        lambda f: changed(f.documents, lambda a: with_value(a, 19, VOCAB)),
        r"tokenized\.npy has token 30 in row 19; the model's vocabulary has the ids 0 to 29",
    ),
    "id below": (
        lambda f: changed(f.documents, lambda a: with_value(a, 4, -1)),
        r"tokenized\.npy has token -1 in row 4",
    ),
    "long entries": (
        lambda f: np.save(f.documents, np.ones((ENTRIES, 13), dtype=np.int16)),
        r"entries of 13 tokens, but the model has 12 positions",
    ),
    "floating tokens": (
        lambda f: changed(f.documents, lambda a: a.astype(np.float32)),
        r"tokenized\.npy is float32",
    ),
    "fewer keys": (
        lambda f: changed(f.keys, lambda a: a[:-1]),
        r"keys\.npy has 24 rows, but .*tokenized\.npy has 25",
    ),
    "wide keys": (
        lambda f: changed(f.keys, lambda a: np.repeat(a, 2, axis=1)),
        r"keys\.npy has shape \(25, 8\), but the configuration's query_size is 4",
    ),
    "wide values": (
        lambda f: changed(f.values, lambda a: np.repeat(a, 2, axis=1)),
        r"values\.npy has shape .* hidden_size is 8",
    ),
    "NaN": (
        lambda f: changed(f.values, lambda a: with_value(a, 9, np.nan)),
        r"values\.npy has NaN or infinity in row 9",
    ),
    "double precision": (
        lambda f: changed(f.keys, lambda a: a.astype(np.float64)),
        r"keys\.npy is float64",
    ),
    "truncated array": (
        lambda f: f.values.write_bytes(f.values.read_bytes()[:-10]),
        r"values\.npy is damaged",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_before_anything_is_written(
    files: PublishedFiles, tmp_path: Path, what: str
) -> None:
    spoil, named = BAD[what]
    spoil(files)
    with pytest.raises(ConversionError, match=named) as caught:
        convert(files, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["given"]


def test_arrays_that_need_each_other_and_a_tokenizer_of_another_model_are_refused(
    files: PublishedFiles, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="give --documents too"):
        convert(files, tmp_path / "out", documents=None)
    with pytest.raises(ConversionError, match="give --keys too"):
        convert(files, tmp_path / "out", keys=None)
    large = vocabulary_file(tmp_path / "large.txt", VOCAB + 1)
    with pytest.raises(ConversionError, match="has 31 tokens, but the model has only 30"):
        convert(files, tmp_path / "out", tokenizer=large)
    small = vocabulary_file(tmp_path / "small.txt", 20)
    with pytest.raises(ConversionError, match="the tokenizer has the ids 0 to 19"):
        convert(files, tmp_path / "out", tokenizer=small)
    (tmp_path / "bare.txt").write_text("[PAD]\n[UNK]\n[SEP]\n[MASK]\n")
    with pytest.raises(ConversionError, match=r"has no \[CLS\]"):
        convert(files, tmp_path / "out", tokenizer=tmp_path / "bare.txt")
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_left_alone(
    files: PublishedFiles, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    convert(files, tmp_path / "out")  # an empty one is as good as none
    before = sorted(tmp_path.rglob("*"))
    for again in (
        lambda: convert(files, tmp_path / "out"),
        lambda: convert_to_published(tmp_path / "out", tmp_path / "given"),
    ):
        with pytest.raises(ConversionError, match="exists and is not empty"):
            again()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_published_code_cannot_express_is_said(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2}
    PlugLMConfig(**shape, query_norm="layer", value_pooling="tokens").save_pretrained(tmp_path)
    with pytest.raises(ConversionError) as caught:
        convert_to_published(tmp_path, tmp_path / "out")
    for reason in ("no legacy model", "query_norm is 'layer'", "value_pooling is 'tokens'"):
        assert reason in str(caught.value)
    with pytest.raises(ConversionError, match="there is no model at"):
        convert_to_published(tmp_path / "nothing", tmp_path / "out")


def test_a_model_that_is_not_whole_is_not_written_back(
    files: PublishedFiles, tmp_path: Path
) -> None:
    convert(files, tmp_path / "ours")
    weights = tmp_path / "ours" / "model" / "model.safetensors"
    state = load_tensors(weights)
    del state["head.dense.bias"]
    save_tensors(weights, state)
    with pytest.raises(ConversionError, match=r"lacks head\.dense\.bias"):
        convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_an_edited_memory_is_written_in_the_order_of_its_ids(
    files: PublishedFiles, tmp_path: Path
) -> None:
    convert(files, tmp_path / "ours")
    Store.open(tmp_path / "ours" / "memory").commit(remove_ids=[0, 5], message="fewer")
    report = convert_to_published(tmp_path / "ours", tmp_path / "theirs")
    kept = [i for i in range(ENTRIES) if i not in (0, 5)]
    for name, path in (("tokenized", files.documents), ("keys", files.keys)):
        assert np.array_equal(np.load(tmp_path / "theirs" / f"{name}.npy"), np.load(path)[kept])
    assert np.load(tmp_path / "theirs" / "tokenized.npy").shape == (ENTRIES - 2, TOKENS)
    assert any("ids are not kept" in note for note in report.notes)
