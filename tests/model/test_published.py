"""Published names and settings, both ways, without any published number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM
from model.published import (
    our_name,
    our_state,
    published_name,
    published_names,
    take_published,
    to_published,
)
from model.published_config import (
    config_from_published,
    config_to_published,
    taken_by_default,
)

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
    "query_size": 4,
    "memory_layer_ffn_dim": 10,
    "num_memory_layers": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "two memory layers": {"num_memory_layers": 2, "memory_k": 3},
    "no memory FFN, no BatchNorm": {"memory_layer_ffn_dim": 0, "query_batchnorm": False},
    "sentence level, other poolers": {
        "knowledge_attention_type": "sentence_level",
        "document_encoder_pooler_type": "avg",
        "memory_pooler_type": "cls",
    },
    "first layers": {"document_encoder_type": "first_2", "num_memory_layers": 1},
    "fixed keys": {"fix_keys": True},
    "fixed keys and values": {"fix_keys": True, "fix_values": True},
}


def random_model(**changes: Any) -> PlugLMForMaskedLM:
    model = PlugLMForMaskedLM(config_from_published(SIZES | changes))
    for value in model.state_dict().values():
        if value.dtype.is_floating_point:
            value.normal_()
        else:
            value.fill_(7)
    return model


def shapes_of(config: PlugLMConfig) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in PlugLMForMaskedLM(config).state_dict().items()}


def published_state(**changes: Any) -> tuple[PlugLMConfig, dict[str, Tensor]]:
    model = random_model(**changes)
    return model.config, to_published(model.state_dict(), model.config)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("bert.embeddings.LayerNorm.bias", "pluglm.embeddings.LayerNorm.bias"),
        ("bert.encoder.layer.0.output.dense.weight", "pluglm.layers.0.ffn.dense_out.weight"),
        ("bert.encoder.layer.2.ffn.0.bias", "pluglm.layers.2.ffn.dense_in.bias"),
        ("bert.encoder.layer.2.LayerNorm.bias", "pluglm.layers.2.LayerNorm.bias"),
        (
            "bert.encoder.layer.2.attention.output.LayerNorm.bias",
            "pluglm.layers.2.attention.LayerNorm.bias",
        ),
        ("bert.encoder.layer.1.output.LayerNorm.bias", "pluglm.layers.1.LayerNorm.bias"),
        (
            "bert.encoder.layer.2.memory_layer.batch_norm.running_var",
            "pluglm.layers.2.query_norm.running_var",
        ),
        (
            "bert.encoder.layer.2.memory_layer.know_attn.beta",
            "pluglm.layers.2.knowledge_attention.beta",
        ),
        (
            "bert.encoder.layer.2.memory_layer.know_attn.biased_multihead_attn.q_proj.bias",
            "pluglm.layers.2.knowledge_attention.q_proj.bias",
        ),
        (
            "bert.encoder.retriever.document_encoder.pooler.pooler.att_fc2.weight",
            "pluglm.entry_encoder.pooler.att_fc2.weight",
        ),
        ("cls.predictions.bias", "head.decoder_bias"),
        ("cls.predictions.decoder.weight", "head.decoder.weight"),
        ("cls.predictions.transform.LayerNorm.weight", "head.LayerNorm.weight"),
    ],
)
def test_a_published_name_has_one_of_ours_and_back(published: str, ours: str) -> None:
    assert our_name(published) == ours
    assert published_name(ours, config_from_published(SIZES)) == published


@pytest.mark.parametrize(
    "unknown",
    ["bert.pooler.dense.weight", "cls.predictions.decoder.bias", "bert.encoder.layer.x.ffn.0.bias"],
)
def test_an_unknown_name_is_refused(unknown: str) -> None:
    with pytest.raises(ValueError, match=unknown):
        our_name(unknown)


def test_aliases_are_those_of_the_published_modules_in_loading_order() -> None:
    two = config_from_published(SIZES | {"num_memory_layers": 2})
    assert published_names("pluglm.entry_encoder.key_proj.bias", two) == (
        "bert.encoder.retriever.key_proj.bias",
        "bert.encoder.layer.1.memory_layer.retriever.key_proj.bias",
        "bert.encoder.layer.2.memory_layer.retriever.key_proj.bias",
    )
    assert published_names("pluglm.embeddings.LayerNorm.bias", two)[1:3] == (
        "bert.encoder.retriever.document_encoder.embedding.LayerNorm.bias",
        "bert.encoder.layer.1.memory_layer.retriever.document_encoder.embedding.LayerNorm.bias",
    )
    assert published_names("head.decoder_bias", two)[-1] == "cls.predictions.decoder.bias"
    first = config_from_published(SIZES | {"document_encoder_type": "first_1"})
    # The retriever is loaded before the layers, and by each memory layer once more.
    assert published_names("pluglm.layers.0.ffn.dense_in.bias", first) == (
        "bert.encoder.retriever.document_encoder.bert_encoder.0.intermediate.dense.bias",
        "bert.encoder.layer.0.intermediate.dense.bias",
        "bert.encoder.layer.2.memory_layer.retriever.document_encoder.bert_encoder.0."
        "intermediate.dense.bias",
    )
    assert len(published_names("pluglm.layers.1.ffn.dense_in.bias", first)) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_is_the_identity_on_every_tensor(variant: str) -> None:
    config, published = published_state(**VARIANTS[variant])
    taken = take_published(published, config, shapes_of(config))
    assert not taken.made
    assert not taken.disagreeing
    assert {n.rsplit(".", 1)[1] for n in taken.left} == {"position_ids"}
    PlugLMForMaskedLM(config).load_state_dict(taken.state, strict=True)
    back = to_published(taken.state, config)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[n], published[n]) for n in back)
    assert config_to_published(config)["num_memory_layers"] == config.num_memory_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_survive_both_ways(variant: str) -> None:
    config = config_from_published(SIZES | VARIANTS[variant])
    theirs = config_to_published(config)
    assert theirs | SIZES | VARIANTS[variant] == theirs
    run = {"data_args": {}, "model_args": theirs, "training_args": {}}
    assert config_from_published(run).to_dict() == config.to_dict()


def test_settings_that_the_json_leaves_out_are_the_published_codes_own() -> None:
    config = config_from_published({"hidden_size": 768})
    assert (config.num_memory_layers, config.key_size, config.top_k) == (6, 128, 5)
    assert config.legacy
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("wrapped", [True, False])
def test_settings_that_the_json_leaves_out_are_named_with_what_was_taken(wrapped: bool) -> None:
    whole = config_to_published(config_from_published(SIZES))
    assert taken_by_default(whole) == {}
    left_out = {"memory_k": 5, "query_batchnorm": True, "classifier_dropout": None}
    part = {n: v for n, v in whole.items() if n not in left_out and n != "return_I"}
    assert taken_by_default({"model_args": part} if wrapped else part) == left_out


def test_what_is_missing_unknown_or_misshapen_is_named() -> None:
    config, published = published_state()
    shapes = shapes_of(config)
    del published["bert.encoder.layer.2.ffn.1.bias"]
    published["bert.encoder.layer.3.output.dense.bias"] = torch.zeros(8)
    published["cls.predictions.transform.dense.bias"] = torch.zeros(9)
    published["bert.embeddings.position_ids"] = torch.arange(6).unsqueeze(0) + 1
    published["bert.embeddings.LayerNorm.bias"] = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        take_published(published, config, shapes)
    told = str(caught.value)
    assert "1 missing: bert.encoder.layer.2.ffn.1.bias;" in told
    assert "config describes: bert.encoder.layer.3.output.dense.bias;" in told
    assert "cls.predictions.transform.dense.bias (is torch.float32 [9], must be [8])" in told
    assert "bert.embeddings.LayerNorm.bias (is torch.int64 [8]" in told
    assert "positions: bert.embeddings.position_ids" in told


def test_the_alias_that_is_loaded_last_wins_and_is_told() -> None:
    config, published = published_state()
    last = "bert.encoder.layer.2.memory_layer.retriever.key_proj.bias"
    published[last] = published[last] + 1
    taken = take_published(published, config, shapes_of(config))
    assert taken.taken["pluglm.entry_encoder.key_proj.bias"] == last
    assert torch.equal(taken.state["pluglm.entry_encoder.key_proj.bias"], published[last])
    assert taken.disagreeing == ("bert.encoder.retriever.key_proj.bias",)


def test_an_alias_alone_is_enough() -> None:
    config, published = published_state()
    value = published.pop("cls.predictions.bias")
    taken = take_published(published, config, shapes_of(config))
    assert torch.equal(taken.state["head.decoder_bias"], value)


def test_what_belongs_to_next_sentences_is_left() -> None:
    config, published = published_state()
    extra = {
        "cls.seq_relationship.weight": torch.ones(2, 8),
        "bert.pooler.dense.bias": torch.ones(8),
    }
    taken = take_published(published | extra, config, shapes_of(config))
    assert extra.keys() <= taken.left.keys()


def test_the_number_of_batches_may_be_a_row_of_one() -> None:
    config, published = published_state()
    name = "bert.encoder.layer.2.memory_layer.batch_norm.num_batches_tracked"
    assert published[name].shape == ()
    published[name] = published[name].reshape(1)
    taken = take_published(published, config, shapes_of(config))
    assert taken.state["pluglm.layers.2.query_norm.num_batches_tracked"].shape == ()
    assert our_state({name: published[name]}).popitem()[1].shape == ()


def test_projections_that_nothing_reads_may_be_absent_and_stay_so() -> None:
    config, published = published_state(fix_keys=True)
    for name in [n for n in published if ".key_proj." in n]:
        del published[name]
    taken = take_published(published, config, shapes_of(config))
    prefix = "pluglm.entry_encoder.key_proj"
    assert taken.made == (f"{prefix}.weight", f"{prefix}.bias")
    assert not taken.state[f"{prefix}.weight"].any()
    assert to_published(taken.state, config).keys() == published.keys()
    free = config_from_published(SIZES)
    with pytest.raises(ValueError, match=r"2 missing: bert\.encoder\.retriever\.key_proj"):
        take_published(published, free, shapes_of(free))


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({}, "holds no settings of a published model"),
        ({"model_args": 3}, "holds no settings of a published model"),
        (SIZES | {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (SIZES | {"knowledge_attention_type": "single_head"}, "cannot compute"),
        (SIZES | {"document_encoder_type": "whole"}, "document_encoder_type is 'whole'"),
        (SIZES | {"memory_pooler_type": "sum"}, "memory_pooler_type is 'sum'"),
        (SIZES | {"num_memory_layers": 0}, "num_memory_layers is 0"),
        (SIZES | {"hidden_size": 9}, "not divisible"),
        (SIZES | {"hidden_size": "8"}, "hidden_size"),
    ],
)
def test_settings_that_describe_no_published_model_are_refused(
    raw: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        config_from_published(raw)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "no legacy model"),
        ({"legacy": True, "query_norm": "layer"}, "query_norm is 'layer'"),
        ({"value_pooling": "tokens"}, "value_pooling is 'tokens'"),
        ({"legacy": True, "memory_attention": "single_head"}, "memory_attention is 'single_head'"),
        ({"legacy": True, "num_memory_layers": 0}, "no memory layer"),
    ],
)
def test_what_the_published_code_cannot_compute_is_said(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        config_to_published(PlugLMConfig(**changes))
