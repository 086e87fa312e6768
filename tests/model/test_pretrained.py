"""Saving, loading and initialising, the transformers way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from model import PlugLMConfig, PlugLMForMaskedLM, PlugLMModel
from model.rows import Rows
from tests.reference.worlds import SIZES, make_world

VARIANTS: list[dict[str, Any]] = [
    {},
    {"legacy": True, "num_memory_layers": 2},
    {"value_pooling": "separate", "query_norm": "layer", "memory_ffn_size": 0},
    {"value_pooling": "tokens", "query_norm": "none", "memory_init": "copy"},
    {"memory_attention": "sentence_level"},
    {"num_memory_layers": 0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_what_is_saved_is_what_is_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    world = make_world(**settings)
    model = world.model.float().eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / "model.safetensors").exists()
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is PlugLMForMaskedLM
    assert not any(report.values()), report
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    for lookup in (None, world.memory.lookup):
        given = loaded(**world.inputs, lookup=lookup).logits
        assert torch.equal(given, model(**world.inputs, lookup=lookup).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is PlugLMConfig
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_the_encoder_loads_from_the_whole_model(tmp_path: Path) -> None:
    world = make_world()
    world.model.float().eval().save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is PlugLMModel
    given = encoder(**world.inputs, lookup=world.memory.lookup).last_hidden_state
    wanted = world.model.pluglm(**world.inputs, lookup=world.memory.lookup).last_hidden_state
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_decoder_is_the_word_embedding_except_in_legacy(legacy: bool, tmp_path: Path) -> None:
    model = PlugLMForMaskedLM(PlugLMConfig(**SIZES, legacy=legacy))
    model.save_pretrained(tmp_path)
    for one in (model, PlugLMForMaskedLM.from_pretrained(tmp_path)):
        same = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert same is not legacy


def test_copy_starts_the_memory_path_at_the_identity_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(PlugLMConfig(**SIZES, memory_init="copy"))
    layer, entries = model.pluglm.layers[2], model.pluglm.entry_encoder
    knowledge = layer.knowledge_attention
    square = (knowledge.k_proj, knowledge.v_proj, knowledge.out_proj, entries.value_proj)
    scales = {id(m): 1.0 for m in (*square, model.head.dense)} | {id(knowledge.q_proj): 3.0}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.shape == (16, 16):
            expected = scales.get(id(module))
            is_identity = torch.equal(module.weight, torch.eye(16) * (expected or 1.0))
            assert is_identity is (expected is not None)
    # Queries and keys are the same projection of the same embeddings.
    assert torch.equal(layer.query_proj.weight, entries.key_proj.weight)
    assert torch.equal(entries.key_proj.weight, torch.eye(SIZES["key_size"], 16))
    assert not model.pluglm.embeddings.token_type_embeddings.weight.any()
    normal = PlugLMForMaskedLM(PlugLMConfig(**SIZES))
    assert normal.pluglm.embeddings.token_type_embeddings.weight.any()
    for module in normal.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.shape == (16, 16):
            assert 0.01 < float(module.weight.detach().std()) < 0.03


def test_loading_a_copying_model_does_not_start_it_again(tmp_path: Path) -> None:
    model = PlugLMForMaskedLM(PlugLMConfig(**SIZES, memory_init="copy"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = PlugLMForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_copying_memory_passes_on_the_token_that_is_asked_for() -> None:
    """Untrained, the knowledge attention of a position leans to the entry token most like it."""
    torch.manual_seed(0)
    settings = SIZES | {"hidden_size": 64, "num_attention_heads": 1, "value_pooling": "tokens"}
    model = PlugLMForMaskedLM(PlugLMConfig(**settings, memory_init="copy")).eval()
    knowledge = model.pluglm.layers[2].knowledge_attention
    values = torch.randn(1, 1, 5, 64) * 3
    memory, attention = knowledge(
        values[:, 0],
        Rows(torch.ones(1, 5, dtype=torch.bool)),
        torch.zeros(1, 1),
        values,
        torch.ones(1, 1, 5, dtype=torch.bool),
    )
    assert torch.equal(attention[0, 0].argmax(-1), torch.arange(5))
    torch.testing.assert_close(memory[0], values[0, 0], rtol=1e-3, atol=1e-2)


def test_statistics_and_betas_start_where_the_config_says() -> None:
    assert PlugLMConfig().memory_beta_init == 1.0
    model = PlugLMForMaskedLM(PlugLMConfig(**SIZES, memory_beta_init=3.0))
    layer = model.pluglm.layers[2]
    assert torch.equal(layer.knowledge_attention.beta, torch.full((4,), 3.0))
    assert torch.equal(layer.query_norm.running_mean, torch.zeros(8))
    assert torch.equal(layer.query_norm.running_var, torch.ones(8))
    assert int(layer.query_norm.num_batches_tracked) == 0
    assert not model.head.decoder_bias.any()
    assert not model.pluglm.embeddings.word_embeddings.weight[0].any()
