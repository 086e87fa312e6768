"""Keys from tables are the keys that the model computes entry by entry."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import (
    KeyEncoderFactory,
    PlugLMConfig,
    PlugLMForMaskedLM,
    is_key_weight,
    key_table_rows,
    key_tables,
)
from model.key_tables import KeyTables, tables_pay_from

VOCABULARY, POSITIONS, KEY = 40, 11, 8
POOLERS = ("attentive", "mean", "cls")


def config_of(**settings: Any) -> PlugLMConfig:
    return PlugLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=POSITIONS,
        key_size=KEY,
        memory_ffn_size=0,
        **settings,
    )


def make_weights(config: PlugLMConfig, scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Random weights; none is at its initial value, where biases and types would not be seen."""
    torch.manual_seed(seed)
    named = PlugLMForMaskedLM(config).pluglm.named_parameters()
    return {n: scale * torch.randn_like(p) for n, p in named if is_key_weight(n, config)}


def direct_keys(
    weights: dict[str, Tensor], config: PlugLMConfig, tokens_NS: Tensor, dtype: torch.dtype
) -> Tensor:
    """The whole model's own keys, in any precision."""
    model = PlugLMForMaskedLM(config).eval().to(dtype).pluglm
    model.load_state_dict({n: w.to(dtype) for n, w in weights.items()}, strict=False)
    with torch.no_grad():
        keys: Tensor = model.encode_entries(tokens_NS).keys_nQ
    return keys


def some_entries(count: int, length: int, pad: int = 0) -> Tensor:
    """Full ones, short ones, one that is empty, and one with pads amid its tokens."""
    tokens = torch.randint(0, VOCABULARY, (count, length))
    keep = torch.arange(length) < torch.randint(0, length + 1, (count, 1))
    keep[0], keep[1], keep[2, ::2] = True, False, False
    return torch.where(keep, tokens, pad)


@pytest.mark.parametrize("length", [1, 7, POSITIONS])
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("pooler", POOLERS)
def test_they_are_the_models_keys(pooler: str, pad: int, length: int) -> None:
    config = config_of(entry_pooler=pooler, pad_token_id=pad)
    weights = make_weights(config, 0.3)
    tokens = some_entries(300, length, pad)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        tables = KeyTables.of_weights(weights, config, entry_tokens=length, dtype=dtype)
        keys, wanted = tables(tokens), direct_keys(weights, config, tokens, dtype)
        torch.testing.assert_close(keys, wanted, rtol=0, atol=atol)
    torch.testing.assert_close(keys[1], weights["entry_encoder.key_proj.bias"].double())


@settings(deadline=None, max_examples=60)
@given(
    pooler=st.sampled_from(POOLERS),
    scale=st.sampled_from([1e-6, 1e-3, 0.02, 0.3, 3.0, 30.0]),
    seed=st.integers(0, 3),
    entries=st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=9, max_size=9), min_size=1, max_size=8
    ),
)
def test_any_entries_at_any_size_of_the_weights(
    pooler: str, scale: float, seed: int, entries: list[list[int]]
) -> None:
    config = config_of(entry_pooler=pooler)
    weights = make_weights(config, scale, seed)
    tokens = torch.tensor(entries)
    exact = direct_keys(weights, config, tokens, torch.float64)
    wide = KeyTables.of_weights(weights, config, entry_tokens=9, dtype=torch.float64)(tokens)
    # Scores grow with the square of the weights and stand in an exponent.
    size = max(1e-3, float(exact.abs().max())) * max(1.0, scale**2)
    assert float((wide - exact).abs().max()) < 1e-11 * size
    keys = KeyTables.of_weights(weights, config, entry_tokens=9)(tokens)
    assert float((keys - exact).abs().max()) < 1e-5 * size


def test_what_the_factory_makes_of_tables_is_what_it_makes_of_weights() -> None:
    config = config_of()
    factory = pickle.loads(pickle.dumps(KeyEncoderFactory(config.to_dict())))
    weights = make_weights(config, 0.3)
    tables = factory.tables(weights, entry_tokens=9)
    tokens = some_entries(200, 9)
    keys = factory.from_tables(tables)(tokens)
    torch.testing.assert_close(keys, factory(weights)(tokens), rtol=0, atol=1e-5)
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(factory.from_tables(tables)(tokens.to(dtype)), keys)
    assert factory.from_tables(tables)(tokens[:0]).shape == (0, KEY)
    shorter = factory.from_tables(tables)(tokens[:, :4])
    torch.testing.assert_close(shorter, factory(weights)(tokens[:, :4]), rtol=0, atol=1e-5)
    for weight in weights.values():
        weight.zero_()
    assert torch.equal(factory.from_tables(tables)(tokens), keys)


def test_blocks_do_not_change_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    weights = make_weights(config, 0.3)
    tokens = some_entries(50, 9)
    whole = KeyTables.of_weights(weights, config, entry_tokens=9)(tokens)
    monkeypatch.setitem(key_tables._BLOCK_TOKENS, "cpu", 40)
    monkeypatch.setitem(key_table_rows._BUFFER_ELEMENTS, "cpu", 1000)
    monkeypatch.setitem(key_table_rows.PRODUCT_TOKENS, "cpu", 7)
    parts = KeyTables.of_weights(weights, config, entry_tokens=9)(tokens)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_a_key_does_not_depend_on_how_many_are_made_with_it() -> None:
    config = PlugLMConfig(vocab_size=500, num_hidden_layers=1, key_size=128)
    weights = PlugLMForMaskedLM(config).key_weights()
    tokens = torch.randint(0, 500, (3000, 64))
    encoder = KeyTables.of_weights(weights, config, entry_tokens=64)
    together = encoder(tokens)
    for count in (1, 2, 3, 5, 17, 1000, 1025):
        assert torch.equal(encoder(tokens[:count]), together[:count])


def test_a_word_that_undoes_a_position_keeps_its_digits() -> None:
    config = config_of(layer_norm_eps=1e-12)
    weights = make_weights(config)
    position = weights["embeddings.position_embeddings.weight"][2]
    summed = position + weights["embeddings.token_type_embeddings.weight"][0]
    weights["embeddings.word_embeddings.weight"][7] = 1e-3 * torch.randn(24) - summed
    tokens = torch.tensor([[3, 4, 7, 0], [7, 7, 7, 7]])
    exact = direct_keys(weights, config, tokens, torch.float64)
    keys = KeyTables.of_weights(weights, config, entry_tokens=4)(tokens)
    # Direct encoding in float32 loses as much: the sum itself has so few digits.
    lost = (direct_keys(weights, config, tokens, torch.float32) - exact).abs().max()
    assert float((keys - exact).abs().max()) < 10 * float(lost) + 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "entry_encoder.pooler.att_fc1.weight",
        "entry_encoder.pooler.att_fc2.bias",
        "entry_encoder.key_proj.weight",
    ],
)
def test_weights_that_are_not_numbers_show_in_the_keys(name: str, bad: float) -> None:
    config = config_of()
    weights = make_weights(config, 0.3)
    weights[name].view(-1)[24 * 3 if "word" in name else 0] = bad
    tokens = torch.tensor([[3, 4, 5], [4, 5, 6]])
    wanted = torch.isfinite(direct_keys(weights, config, tokens, torch.float32)).all(-1)
    found = torch.isfinite(KeyTables.of_weights(weights, config, entry_tokens=3)(tokens)).all(-1)
    if math.isnan(bad):
        assert torch.equal(found, wanted)
    # Tanh makes 1 of infinity; tables may turn such weights down, but never hide them.
    assert not bool((found & ~wanted).any())


def test_only_the_tokens_that_occur_are_built_and_others_are_seen() -> None:
    config = config_of()
    weights = make_weights(config, 0.3)
    tokens = some_entries(30, 9) // 4 * 4
    some = KeyTables.of_weights(weights, config, entry_tokens=9, used=tokens)
    every = KeyTables.of_weights(weights, config, entry_tokens=9)
    torch.testing.assert_close(some(tokens), every(tokens), rtol=0, atol=1e-6)
    assert bool(some(torch.tensor([[4, 5]])).isnan().all())


@pytest.mark.parametrize("pooler", ["attentive", "mean", "cls"])
@pytest.mark.parametrize("entry_tokens", [None, 9])
def test_bytes_are_known_before_tables_are_built(pooler: str, entry_tokens: int | None) -> None:
    config = config_of(entry_pooler=pooler)
    factory = KeyEncoderFactory(config.to_dict())
    tables = factory.tables(make_weights(config), entry_tokens=entry_tokens)
    assert tables is not None
    floats = [tensor for tensor in tables.values() if tensor.dtype == torch.float32]
    assert factory.tables_bytes(entry_tokens) == sum(tensor.nbytes for tensor in floats)


def test_what_has_no_tables_says_so() -> None:
    for choice in (
        {"entry_pooler": "max"},
        {"entry_encoder": "first_n", "entry_encoder_layers": 1},
    ):
        config = config_of(**choice)
        factory = KeyEncoderFactory(config.to_dict())
        assert factory.tables(make_weights(config)) is None
        assert factory.tables_pay_from() is None
        assert factory.tables_bytes() == 0
        with pytest.raises(ValueError, match="no key tables"):
            KeyTables.of_weights(make_weights(config), config)


@pytest.mark.parametrize("token", [VOCABULARY, -1, 2**32 + 1])
def test_a_token_beyond_the_vocabulary_is_refused(token: int) -> None:
    config = config_of()
    tables = KeyTables.of_weights(make_weights(config), config)
    with pytest.raises((IndexError, RuntimeError)):
        tables(torch.tensor([[1, 2], [token, 3]]))


def test_bad_sizes_and_weights_are_refused() -> None:
    config = config_of()
    factory = KeyEncoderFactory(config.to_dict())
    weights = make_weights(config)
    with pytest.raises(ValueError, match="entry_tokens is 12; allowed: 1 to"):
        factory.tables(weights, entry_tokens=POSITIONS + 1)
    with pytest.raises(ValueError, match="entries of 5 tokens, but these tables are for at most 4"):
        KeyTables.of_weights(weights, config, entry_tokens=4)(torch.ones(2, 5, dtype=torch.int64))
    del weights["entry_encoder.key_proj.bias"]
    with pytest.raises(ValueError, match=r"missing entry_encoder\.key_proj\.bias"):
        factory.tables(weights)


def test_the_digest_tells_tables_apart() -> None:
    config = config_of()
    factory = KeyEncoderFactory(config.to_dict())
    weights = make_weights(config)
    digests = [factory.tables_digest(weights, entry_tokens=9)]
    assert factory.tables_digest(dict(reversed(weights.items())), entry_tokens=9) == digests[0]
    digests.append(factory.tables_digest(weights, entry_tokens=8))
    for other in ({"layer_norm_eps": 1e-5}, {"pad_token_id": 1}, {"entry_pooler": "mean"}):
        changed = KeyEncoderFactory(config_of(**other).to_dict())
        digests.append(changed.tables_digest(weights, entry_tokens=9))
    weights["entry_encoder.key_proj.bias"][-1] += 1e-6
    digests.append(factory.tables_digest(weights, entry_tokens=9))
    assert len(set(digests)) == len(digests)


def test_tables_pay_for_many_entries_only() -> None:
    base = PlugLMConfig()
    small = tables_pay_from(base, 64)
    assert 100 < small < 10_000
    assert tables_pay_from(PlugLMConfig(vocab_size=250_000), 64) > small
