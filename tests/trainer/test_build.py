"""The model that a run starts from: reproducible, and taking over a BERT where it has its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, DistilBertConfig

from model import KeyEncoderFactory, PlugLMConfig, is_key_weight
from model.rows import Rows
from trainer.build import build_model, model_config
from trainer.settings import ConfigError, ModelSettings


def settings(**changes: Any) -> ModelSettings:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "intermediate_size": 24,
        "max_positions": 12,
        "memory_ffn_size": 20,
        "key_size": 6,
    }
    return ModelSettings(**(sizes | changes))


def config(**changes: Any) -> PlugLMConfig:
    return model_config(settings(**changes), vocab_size=40, pad_token_id=3)


def bert(path: Path, **changes: Any) -> BertModel:
    """A BERT with random weights, biases and norms too, saved as `transformers` does."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    source = BertModel(BertConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    source.save_pretrained(path)
    return source


def test_the_model_has_the_shape_that_the_settings_say() -> None:
    made = config(dropout=0.25, memory_layers=2, query_norm="batch", value_pooling="separate")
    assert (made.vocab_size, made.pad_token_id) == (40, 3)
    assert (made.hidden_size, made.num_hidden_layers, made.num_attention_heads) == (16, 3, 2)
    assert (made.intermediate_size, made.max_position_embeddings) == (24, 12)
    assert made.hidden_dropout_prob == made.attention_probs_dropout_prob == 0.25
    assert (made.num_memory_layers, made.memory_ffn_size, made.key_size) == (2, 20, 6)
    assert (made.query_norm, made.value_pooling) == ("batch", "separate")


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(config(), seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_model(config(), seed=1).state_dict()
    other = build_model(config(), seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    words = "pluglm.embeddings.word_embeddings.weight"
    assert not torch.equal(first[words], other[words])


def test_key_weights_make_an_encoder_and_are_copies() -> None:
    model = build_model(config(dropout=0.0), seed=0)
    weights = model.key_weights()
    named = dict(model.pluglm.named_parameters())
    assert set(weights) == {name for name in named if is_key_weight(name, model.config)}
    tokens_NS = torch.randint(4, 40, (5, 7))
    before = KeyEncoderFactory(model.config.to_dict())(weights)(tokens_NS)
    with torch.no_grad():
        expected = model.pluglm.entry_keys(tokens_NS)
        torch.testing.assert_close(before, expected)
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(KeyEncoderFactory(model.config.to_dict())(weights)(tokens_NS), before)


@pytest.mark.parametrize("whole", [True, False])
def test_a_bert_without_the_memory_layer_is_taken_exactly(tmp_path: Path, whole: bool) -> None:
    """Up to the memory layer the hidden states are BERT's own, so every tensor is in its place."""
    source = bert(tmp_path)
    if whole:
        # As most are published: with the masked-LM head around it.
        head = BertForMaskedLM(source.config)
        head.bert.load_state_dict(source.state_dict(), strict=False)
        head.save_pretrained(tmp_path)
    model = build_model(config(dropout=0.0), seed=0, init_from=str(tmp_path)).eval()
    ids_BT = torch.randint(4, 40, (2, 9))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    with torch.no_grad():
        wanted = source.eval()(ids_BT, attention_mask=mask_BT, output_hidden_states=True)
        x_BTH = model.pluglm.embeddings(ids_BT)
        for i in range(2):
            torch.testing.assert_close(x_BTH[mask_BT > 0], wanted.hidden_states[i][mask_BT > 0])
            x_BTH = model.pluglm.layers[i](x_BTH, Rows(mask_BT > 0))
        torch.testing.assert_close(x_BTH[mask_BT > 0], wanted.hidden_states[2][mask_BT > 0])
        attended = model.pluglm.layers[2].attention(x_BTH, Rows(mask_BT > 0))
        theirs = source.encoder.layer[2].attention(
            wanted.hidden_states[2], (1.0 - mask_BT[:, None, None].float()) * -1e9
        )[0]
        torch.testing.assert_close(attended[mask_BT > 0], theirs[mask_BT > 0])


def test_of_the_memory_layer_only_berts_own_parts_are_taken(tmp_path: Path) -> None:
    source = bert(tmp_path)
    plain = build_model(config(), seed=0).pluglm.layers[2].state_dict()
    taken = build_model(config(), seed=0, init_from=str(tmp_path)).pluglm.layers[2].state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], taken[name])}
    assert changed == {n for n in plain if n.startswith(("attention.", "LayerNorm."))}
    assert torch.equal(taken["LayerNorm.weight"], source.encoder.layer[2].output.LayerNorm.weight)


def test_the_first_positions_and_layers_of_a_larger_bert_are_taken(tmp_path: Path) -> None:
    source = bert(tmp_path, max_position_embeddings=50, num_hidden_layers=5)
    model = build_model(config(), seed=0, init_from=str(tmp_path))
    positions = model.pluglm.embeddings.position_embeddings.weight
    assert torch.equal(positions, source.embeddings.position_embeddings.weight[:12])


def test_berts_masked_lm_head_is_taken_with_it(tmp_path: Path) -> None:
    head = BertForMaskedLM(bert(tmp_path).config)
    with torch.no_grad():
        for parameter in head.cls.parameters():
            parameter.normal_()
    head.save_pretrained(tmp_path)
    model = build_model(config(), seed=0, init_from=str(tmp_path))
    assert torch.equal(model.head.dense.weight, head.cls.predictions.transform.dense.weight)
    assert torch.equal(model.head.LayerNorm.bias, head.cls.predictions.transform.LayerNorm.bias)
    assert torch.equal(model.head.decoder_bias, head.cls.predictions.bias)
    words = model.pluglm.embeddings.word_embeddings.weight
    assert model.head.decoder.weight.data_ptr() == words.data_ptr()


@pytest.mark.parametrize("place", [".", "model"])
def test_another_pluglm_is_taken_whole(tmp_path: Path, place: str) -> None:
    source = build_model(config(query_norm="batch", max_positions=20), seed=1)
    with torch.no_grad():
        for value in source.state_dict().values():
            value.copy_(torch.randn(value.shape) * 9)
    source.save_pretrained(tmp_path / place)
    model = build_model(config(query_norm="batch"), seed=0, init_from=str(tmp_path))
    given, taken = source.state_dict(), model.state_dict()
    assert len(taken) == len(given)
    for name, value in taken.items():
        assert torch.equal(value, given[name][: len(value)] if value.ndim else given[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"value_pooling": "shared"}, "its value_pooling is shared, but model.value_pooling is to"),
        ({"memory_layers": 2}, "its num_memory_layers is 2, but model.memory_layers is 1"),
        ({"num_layers": 2}, "its num_hidden_layers is 2, but model.num_layers is 3"),
        ({"key_size": 7}, "its key_size is 7, but model.key_size is 6"),
        ({"max_positions": 11}, "its max_position_embeddings is 11"),
    ],
)
def test_a_pluglm_whose_weights_mean_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    build_model(config(**changes), seed=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build_model(config(), seed=0, init_from=str(tmp_path))
    assert named in str(caught.value)


def test_a_pluglm_in_the_published_layout_or_of_another_tokenizer_is_refused(
    tmp_path: Path,
) -> None:
    shape = config(value_pooling="shared")
    shape.legacy = True
    build_model(shape, seed=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="published checkpoints' layout"):
        build_model(config(value_pooling="shared"), seed=0, init_from=str(tmp_path))
    theirs, ours = config(), config()
    theirs.tokenizer_fingerprint, ours.tokenizer_fingerprint = "aa", "bb"
    build_model(theirs, seed=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer_fingerprint is aa"):
        build_model(ours, seed=0, init_from=str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, but model.hidden_size is 16"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, but model.num_heads is 2"),
        ({"intermediate_size": 8}, "intermediate_size is 8, but model.intermediate_size is 24"),
        ({"vocab_size": 41}, "vocab_size is 41, but the corpus's tokenizer's vocabulary is 40"),
        ({"type_vocab_size": 1}, "type_vocab_size is 1"),
        ({"max_position_embeddings": 8}, "is 8, but model.max_positions is 12; lower it to 8"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, but model.num_layers is 3; lower it"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_other_sizes_are_refused(tmp_path: Path, sizes: dict[str, Any], named: str) -> None:
    bert(tmp_path, **sizes)
    with pytest.raises(ConfigError) as caught:
        build_model(config(), seed=0, init_from=str(tmp_path))
    assert named in str(caught.value)


def test_what_is_no_bert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build_model(config(), seed=0, init_from=str(tmp_path))
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a 'distilbert' model"):
        build_model(config(), seed=0, init_from=str(tmp_path))
    BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_model(config(), seed=0, init_from=str(tmp_path))
