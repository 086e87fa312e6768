"""Which weights decay, at which rate each is learned, and how the rate rises and falls."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import PlugLMConfig, PlugLMForMaskedLM, is_key_weight
from trainer.lamb import Lamb
from trainer.optim import lr_factor, make_optimizer, parameter_groups
from trainer.settings import OptimSettings


def tiny_model(**changes: Any) -> PlugLMForMaskedLM:
    sizes: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 8,
        "key_size": 4,
        "memory_ffn_size": 8,
        "value_pooling": "separate",
        "query_norm": "batch",
    }
    return PlugLMForMaskedLM(PlugLMConfig(**(sizes | changes)))


def group_of(model: PlugLMForMaskedLM, optim: OptimSettings) -> dict[str, dict[str, Any]]:
    """Each parameter's group, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(model, optim):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    return found


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = tiny_model()
    assert set(group_of(model, OptimSettings())) == set(dict(model.named_parameters()))


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = tiny_model()
    model.pluglm.embeddings.word_embeddings.weight.requires_grad_(False)
    names = set(group_of(model, OptimSettings()))
    assert set(dict(model.named_parameters())) - names == {
        "pluglm.embeddings.word_embeddings.weight"
    }


def test_matrices_decay_and_biases_and_normalisation_do_not() -> None:
    model = tiny_model()
    norms = (torch.nn.LayerNorm, type(model.pluglm.layers[-1].query_norm))
    undecayed = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or "bias" in name
    }
    groups = group_of(model, OptimSettings(weight_decay=0.1))
    assert len(undecayed) > 20
    for name, group in groups.items():
        if name in undecayed or name.endswith(".beta"):
            assert group["weight_decay"] == 0.0, name
        else:
            assert group["weight_decay"] == 0.1, name


def test_the_memory_path_has_its_own_rate() -> None:
    model = tiny_model()
    groups = group_of(model, OptimSettings(lr=0.01, memory_lr_scale=3.0))
    scaled = {name for name, group in groups.items() if group["lr"] == 0.03}
    assert {group["lr"] for group in groups.values()} == {0.01, 0.03}
    for part in (
        "key_proj",
        "value_proj",
        "value_pooler",
        "layers.1.pooler",
        "query_proj",
        "query_norm",
        "beta",
    ):
        assert any(part in name for name in scaled), part
    everyone = {"embeddings", "attention", "ffn", "head"}
    assert not any(set(name.split(".")) & everyone for name in scaled)
    made_of_keys = {
        f"pluglm.{n}" for n, _ in model.pluglm.named_parameters() if is_key_weight(n, model.config)
    }
    assert {n for n in made_of_keys if "entry_encoder" in n} <= scaled


def test_the_optimizer_is_adamw_with_the_given_numbers() -> None:
    optim = OptimSettings(lr=0.02, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    optimizer = make_optimizer(tiny_model(), optim)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    assert all(group["eps"] == 1e-7 for group in optimizer.param_groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_fused_or_plain_adamw_or_lamb() -> None:
    for fused in (True, False):
        optimizer = make_optimizer(tiny_model(), OptimSettings(fused=fused))
        assert isinstance(optimizer, torch.optim.AdamW)
        assert optimizer.defaults["fused"] is fused
    lamb = make_optimizer(tiny_model(), OptimSettings(optimizer="lamb", betas=(0.8, 0.9)))
    assert isinstance(lamb, Lamb)
    assert all(group["betas"] == (0.8, 0.9) for group in lamb.param_groups)
    assert {group["weight_decay"] for group in lamb.param_groups} == {0.0, 0.01}


def test_the_papers_schedule() -> None:
    """8,000 steps, warm-up 28.43 %, polynomial decay of degree 0.5."""
    optim = OptimSettings(
        steps=8000, warmup_ratio=0.2843, schedule="polynomial", decay_power=0.5, min_lr_ratio=0.0
    )
    factor = lr_factor(optim)
    assert factor(0) == pytest.approx(1 / 2274)
    assert factor(1136) == pytest.approx(0.5, abs=1e-3)
    assert factor(2273) == 1.0
    assert factor(2274) == 1.0
    middle = 2274 + (8000 - 2274) // 2
    assert factor(middle) == pytest.approx(0.5**0.5)
    assert factor(7999) == pytest.approx((1 / 5726) ** 0.5)
    assert factor(8000) == 0.0


def test_linear_falls_to_its_floor_and_constant_does_not_fall() -> None:
    linear = lr_factor(OptimSettings(steps=100, warmup_ratio=0.1, min_lr_ratio=0.2))
    assert [linear(s) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert linear(55) == pytest.approx(0.6)
    assert linear(100) == linear(250) == pytest.approx(0.2)
    constant = lr_factor(OptimSettings(steps=100, warmup_ratio=0.0, schedule="constant"))
    assert [constant(s) for s in (0, 50, 100)] == [1.0, 1.0, 1.0]


def test_a_degree_belongs_to_the_polynomial_schedule_only() -> None:
    linear = lr_factor(OptimSettings(steps=100, warmup_ratio=0.0, decay_power=3.0))
    assert linear(50) == pytest.approx(0.5)


@given(
    steps=st.integers(1, 2000),
    warmup_ratio=st.floats(0, 0.99),
    min_lr_ratio=st.floats(0, 1),
    decay_power=st.floats(0.1, 4),
    schedule=st.sampled_from(["linear", "polynomial", "constant"]),
)
def test_a_rate_is_never_above_its_peak_and_rises_then_falls(
    steps: int, warmup_ratio: float, min_lr_ratio: float, decay_power: float, schedule: Any
) -> None:
    factor = lr_factor(
        OptimSettings(
            steps=steps,
            warmup_ratio=warmup_ratio,
            min_lr_ratio=min_lr_ratio,
            decay_power=decay_power,
            schedule=schedule,
        )
    )
    values = [factor(step) for step in range(steps + 2)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(value > 0.0 for value in values[:steps])
    peak = max(0, round(steps * warmup_ratio) - 1)
    assert values[peak] == 1.0
    assert all(a <= b for a, b in pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in pairwise(values[peak:]))
