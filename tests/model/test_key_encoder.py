"""The factory that a memory uses to make keys from published weights."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from model import KeyEncoderFactory, PlugLMForMaskedLM, is_key_weight
from tests.reference.worlds import make_model


def published(model: PlugLMForMaskedLM) -> dict[str, Tensor]:
    return {
        n: p.detach() for n, p in model.pluglm.named_parameters() if is_key_weight(n, model.config)
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"value_pooling": "shared"},
        {"value_pooling": "separate"},
        {"value_pooling": "tokens"},
        {"entry_pooler": "mean"},
        {"entry_pooler": "cls"},
        {"entry_encoder": "first_n", "entry_encoder_layers": 2},
        {"entry_encoder": "first_n", "entry_encoder_layers": 1, "entry_pooler": "max"},
    ],
    ids=str,
)
def test_its_keys_are_the_models_keys(settings: dict[str, Any]) -> None:
    model = make_model(**settings, hidden_dropout_prob=0.5).float().eval()
    factory = pickle.loads(pickle.dumps(KeyEncoderFactory(model.config.to_dict())))
    encode = factory(published(model))
    tokens = torch.randint(1, 40, (130, 6)) * (torch.arange(6) < torch.randint(0, 7, (130, 1)))
    keys = encode(tokens)
    with torch.no_grad():
        wanted = model.pluglm.encode_entries(tokens).keys_nQ
    assert keys.dtype == torch.float32
    assert not keys.requires_grad
    torch.testing.assert_close(keys, wanted, rtol=1e-5, atol=1e-6)
    assert encode(tokens[:0]).shape == (0, 8)


def test_it_keeps_the_weights_that_it_was_given() -> None:
    model = make_model().float()
    weights = published(model)
    encode = KeyEncoderFactory(model.config.to_dict())(
        {name: weight.clone() for name, weight in weights.items()}
    )
    tokens = torch.randint(1, 40, (3, 6))
    before = encode(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(encode(tokens), before)


def test_only_what_makes_keys_is_published() -> None:
    names = set(published(make_model(value_pooling="separate")))
    assert names == {
        *(f"embeddings.{p}_embeddings.weight" for p in ("word", "position", "token_type")),
        *(f"embeddings.LayerNorm.{p}" for p in ("weight", "bias")),
        *(
            f"entry_encoder.{module}.{p}"
            for module in ("pooler.att_fc1", "pooler.att_fc2", "key_proj")
            for p in ("weight", "bias")
        ),
    }


def test_it_refuses_weights_that_do_not_fit_and_names_them_all() -> None:
    model = make_model()
    factory = KeyEncoderFactory(model.config.to_dict())
    weights = published(model)
    del weights["entry_encoder.key_proj.bias"]
    weights["entry_encoder.value_proj.weight"] = torch.zeros(16, 16)
    weights["embeddings.word_embeddings.weight"] = torch.zeros(41, 16)
    with pytest.raises(ValueError, match="do not fit the entry encoder") as refused:
        factory(weights)
    message = str(refused.value)
    assert "missing entry_encoder.key_proj.bias" in message
    assert "unknown entry_encoder.value_proj.weight" in message
    assert (
        "embeddings.word_embeddings.weight has shape (41, 16), the config says (40, 16)" in message
    )
