"""Settings that cannot be are refused in one line that says what may be."""

from __future__ import annotations

from typing import Any

import pytest

from model import PlugLMConfig
from tests.reference.worlds import SIZES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_attention": "multihead"}, "'multihead'.*multi_head, single_head, sentence_level"),
        ({"value_pooling": "token"}, "'token'.*shared, separate, tokens"),
        ({"query_norm": "group"}, "'group'.*batch, layer, none"),
        ({"memory_init": "eye"}, "'eye'.*normal, copy"),
        ({"num_attention_heads": 5}, "hidden_size 16.*num_attention_heads 5"),
        ({"num_memory_layers": 4}, "num_memory_layers is 4.*0 to num_hidden_layers.*3"),
        ({"num_memory_layers": -1}, "num_memory_layers is -1"),
        ({"memory_ffn_size": -1}, "memory_ffn_size is -1.*0 leaves the FFN out"),
        ({"key_size": 0}, "key_size is 0.*at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0.*at least 1"),
        (
            {"value_pooling": "tokens", "memory_attention": "sentence_level"},
            "'tokens'.*sentence_level.*use multi_head",
        ),
        ({"legacy": True, "value_pooling": "separate"}, "legacy.*'shared'.*legacy=False"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlugLMConfig(**(SIZES | settings))


def test_the_defaults_are_the_papers_model() -> None:
    config = PlugLMConfig()
    given = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_hidden_layers", "num_memory_layers", "key_size",
                     "memory_ffn_size", "memory_attention", "value_pooling", "query_norm", "legacy")
    }  # fmt: skip
    assert given == {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_memory_layers": 1,
        "key_size": 128,
        "memory_ffn_size": 768,
        "memory_attention": "multi_head",
        "value_pooling": "shared",
        "query_norm": "batch",
        "legacy": False,
    }


@pytest.mark.parametrize(("legacy", "ignored", "tied"), [(False, -100, True), (True, -1, False)])
def test_legacy_unties_the_decoder_and_ignores_minus_one(
    legacy: bool, ignored: int, tied: bool
) -> None:
    config = PlugLMConfig(legacy=legacy)
    assert config.ignored_label == ignored
    assert config.tie_word_embeddings is tied


def test_it_survives_being_a_dictionary() -> None:
    config = PlugLMConfig(**(SIZES | {"value_pooling": "tokens", "query_norm": "layer"}))
    assert PlugLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
