"""Entries encoded once: what is stored is what the model computes, and a memory that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_server.errors import StoreError
from memory_server.local import LocalMemory
from model import (
    KeyEncoderFactory,
    PlugLMConfig,
    PlugLMForMaskedLM,
    PlugLMForSequenceClassification,
)
from tests.toy_memory import ENTRY_TOKENS, VOCAB, toy_entries, toy_store
from trainer.convert.errors import ConversionError
from trainer.convert.freeze import freeze_vectors

ENTRIES = toy_entries(range(40, 110))


def config(**changes: Any) -> PlugLMConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 12,
        "key_size": 8,
        "memory_ffn_size": 4,
        "initializer_range": 0.5,
        "query_norm": "layer",
    }
    return PlugLMConfig(**(sizes | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"value_pooling": "tokens"},
        {"value_pooling": "separate", "entry_encoder": "first_n", "entry_encoder_layers": 2},
    ],
)
def test_a_memory_of_stored_vectors_answers_and_reads_as_one_that_encodes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(config(**changes)).train()
    store = toy_store(tmp_path / "store", ENTRIES[:30], ENTRIES[30:])
    store.commit(remove_ids=[41, 100], message="fewer")
    vectors = freeze_vectors(model, store, tmp_path / "vectors")
    assert model.training
    assert model.pluglm.embeddings.dropout.training
    assert len(vectors.ids_N) == len(ENTRIES) - 2
    per_entry = ENTRY_TOKENS if changes.get("value_pooling") == "tokens" else 1
    assert vectors.values_NJH is not None
    assert vectors.values_NJH.shape[1:] == (per_entry, 8)
    assert (str(vectors.keys_NQ.dtype), str(vectors.values_NJH.dtype)) == ("float32", "float16")

    model.eval()
    ids_BT = torch.randint(1, VOCAB, (3, 10))
    encoder = KeyEncoderFactory(model.config.to_dict())
    stored = LocalMemory(store, vectors=vectors)
    encoding = LocalMemory(store, encoder=encoder, weights=model.key_weights())
    frozen = PlugLMForMaskedLM(config(**changes, fixed_keys=True, fixed_values=True)).eval()
    frozen.load_state_dict(model.state_dict())
    outputs = []
    with stored, encoding, torch.no_grad():
        model.attach(None)
        without = model(ids_BT).logits
        for reader, memory in ((model, encoding), (frozen, stored)):
            reader.attach(memory)
            outputs.append(reader(ids_BT))
    live, fixed = outputs
    assert torch.equal(live.retrievals[0].retrieved.ids, fixed.retrievals[0].retrieved.ids)
    # Values are stored in half precision; what they change is far more.
    torch.testing.assert_close(fixed.logits, live.logits, rtol=0, atol=0.01)
    assert float((without - live.logits).abs().mean()) > 0.1


def test_any_head_can_be_frozen_and_nothing_is_overwritten(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "store", ENTRIES)
    model = PlugLMForSequenceClassification(config())
    freeze_vectors(model, store.path, tmp_path / "vectors").verify()
    with pytest.raises(StoreError, match="holds vectors already"):
        freeze_vectors(model, store, tmp_path / "vectors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "vectors"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_memory_layers": 0}, "no memory layer"),
        ({"max_position_embeddings": 5}, "entries of 6 tokens, but the model reads at most 5"),
        ({"tokenizer_fingerprint": "other"}, r"another tokenizer \(fingerprint toy"),
        ({"vocab_size": 20}, "another tokenizer"),
    ],
)
def test_a_model_that_does_not_go_with_the_memory_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    store = toy_store(tmp_path / "store", ENTRIES)
    with pytest.raises(ConversionError, match=named):
        freeze_vectors(PlugLMForMaskedLM(config(**changes)), store, tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()


def test_weights_that_make_no_numbers_leave_nothing(tmp_path: Path) -> None:
    model = PlugLMForMaskedLM(config())
    with torch.no_grad():
        model.pluglm.entry_encoder.value_proj.weight.mul_(1e6)
    store = toy_store(tmp_path / "store", ENTRIES)
    with pytest.raises(ConversionError, match="values_NJH has NaN or infinity"):
        freeze_vectors(model, store, tmp_path / "vectors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
