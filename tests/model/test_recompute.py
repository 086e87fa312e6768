"""Activation checkpointing changes memory use, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM

V, B, T, N, S, K = 40, 4, 7, 12, 5, 3


@dataclass(frozen=True)
class Found:
    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


class Memory:
    """Answers each question with other entries than the one before, as an edited memory may."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        random = torch.Generator().manual_seed(5)
        self.tokens_NS = torch.randint(1, V, (N, S), generator=random)
        self.random = torch.Generator().manual_seed(6)

    def __call__(self, queries_BQ: Tensor) -> Found:
        self.asked.append(queries_BQ)
        ids_BK = torch.randint(0, N, (len(queries_BQ), K), generator=self.random)
        return Found(ids_BK, self.tokens_NS[ids_BK], ids_BK)


def step(recompute: bool, **options: Any) -> tuple[dict[str, Tensor], PlugLMForMaskedLM, Memory]:
    """One forward and backward pass; (gradients, model, memory)."""
    loss, model, memory = forward(recompute, **options)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model, memory


def forward(recompute: bool, **options: Any) -> tuple[Tensor, PlugLMForMaskedLM, Memory]:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 8,
        "key_size": 4,
        "memory_ffn_size": 16,
        "num_memory_layers": 2,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(1)
    model = PlugLMForMaskedLM(PlugLMConfig(**(sizes | options))).train()
    if recompute:
        model.activation_checkpointing_enable()
    random = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(1, V, (B, T), generator=random)
    mask_BT = (torch.arange(T) < torch.tensor([[7], [5], [6], [3]])).long()
    memory = Memory()
    torch.manual_seed(3)
    output = model(
        ids_BT,
        attention_mask=mask_BT,
        labels=ids_BT.masked_fill(mask_BT == 0, -100),
        lookup=memory,
        positive_tokens=memory.tokens_NS[:B],
        positive_ids=torch.arange(B),
        doc_ids=torch.arange(B),
    )
    return output.loss, model, memory


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("pooling", ["shared", "separate", "tokens"])
def test_gradients_are_the_same_and_the_memory_is_asked_once(norm: str, pooling: str) -> None:
    """With dropout: it is drawn once, too."""
    wanted, plain, asked = step(False, query_norm=norm, value_pooling=pooling)
    given, model, asked_again = step(True, query_norm=norm, value_pooling=pooling)
    assert len(asked.asked) == len(asked_again.asked) == 2
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, msg=naming(name))
    for (name, one), (_, other) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def test_activations_are_not_kept() -> None:
    """Or there would be no point in it."""

    def kept(recompute: bool) -> int:
        held = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(recompute)
        return held

    assert kept(True) < kept(False) / 3


def test_evaluation_recomputes_nothing() -> None:
    _, model, memory = step(True)
    model.eval()
    model(torch.ones(2, 3, dtype=torch.int64), lookup=memory)
    assert len(memory.asked) == 4


def test_the_re_entrant_kind_is_refused() -> None:
    model = PlugLMForMaskedLM(PlugLMConfig(vocab_size=V, hidden_size=16, num_attention_heads=2))
    with pytest.raises(ValueError, match="use_reentrant = False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers = 2"):
        model.activation_checkpointing_enable(every_n_layers=2)
