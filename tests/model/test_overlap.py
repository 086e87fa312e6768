"""Searches that run beside the computation change its order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM, PlugLMModel

V, B, T, N, S, K = 40, 6, 7, 12, 5, 3


@dataclass(frozen=True)
class Found:
    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


class Memory:
    """Finds the entries whose fixed keys are nearest, and keeps a diary of what was done when."""

    def __init__(self, width: int = 4) -> None:
        random = torch.Generator().manual_seed(5)
        self.tokens_NS = torch.randint(1, V, (N, S), generator=random)
        self.keys_NQ = torch.randn(N, width, generator=random)
        self.diary: list[str] = []

    def search(self, queries_BQ: Tensor) -> Found:
        ids_BK = (queries_BQ @ self.keys_NQ.T).topk(K, dim=1).indices
        return Found(ids_BK, self.tokens_NS[ids_BK], ids_BK)

    def __call__(self, queries_BQ: Tensor) -> Found:
        self.diary.append("ask")
        return self.search(queries_BQ)


class Background(Memory):
    """The same, with searches that can be begun."""

    def start(self, queries_BQ: Tensor) -> Callable[[], Found]:
        self.diary.append(f"begin {len(queries_BQ)}")

        def wait() -> Found:
            self.diary.append(f"wait {len(queries_BQ)}")
            return self.search(queries_BQ)

        return wait


def make_model(**options: Any) -> PlugLMForMaskedLM:
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
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "output_retrievals": True,
    }
    torch.manual_seed(1)
    return PlugLMForMaskedLM(PlugLMConfig(**(sizes | options))).double().train()


def step(
    memory: Memory, chunks: int, *, recompute: bool = False, padded: bool = True, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """One forward and backward pass: (output, gradients and buffers)."""
    model = make_model(**options)
    if recompute:
        model.activation_checkpointing_enable()
    random = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(1, V, (B, T), generator=random)
    lengths = torch.tensor([[7], [5], [6], [3], [7], [4]]) if padded else torch.full((B, 1), T)
    mask_BT = (torch.arange(T) < lengths).long()
    wanted_BT = (torch.rand(B, T, generator=random) < 0.4) & (mask_BT == 1)
    wanted_BT[4] = False  # a sequence, in a chunk, without any label
    output = model(
        ids_BT,
        attention_mask=mask_BT if padded else None,
        labels=ids_BT.masked_fill(~wanted_BT, -100),
        lookup=memory,
        positive_tokens=memory.tokens_NS[:B],
        positive_ids=torch.arange(B),
        doc_ids=torch.arange(B),
        output_attention=True,
        retrieval_chunks=chunks,
    )
    output.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output, found | dict(model.named_buffers())


@pytest.mark.parametrize("chunks", [2, 4, 99])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padded": False},
        {"recompute": True},
        {"sparse_prediction": False},
        {"memory_attention": "sentence_level"},
        {"value_pooling": "tokens"},
    ],
    ids=str,
)
def test_loss_gradients_and_statistics_are_those_of_the_whole_batch(
    chunks: int, query_norm: str, options: dict[str, Any]
) -> None:
    whole, expected = step(Memory(), 1, query_norm=query_norm, **options)
    cut, found = step(Background(), chunks, query_norm=query_norm, **options)
    torch.testing.assert_close(cut.loss, whole.loss)
    torch.testing.assert_close(cut.logits, whole.logits)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}")
    for ours, theirs in zip(cut.retrievals, whole.retrievals, strict=True):
        assert ours.layer == theirs.layer
        torch.testing.assert_close(ours.query_BQ, theirs.query_BQ)
        assert torch.equal(ours.retrieved.ids, theirs.retrieved.ids)
        assert torch.equal(ours.retrieved.doc_ids, theirs.retrieved.doc_ids)
        # What padding reads is nobody's business: chunks have less of it.
        read = ours.attention_BATK > 0
        torch.testing.assert_close(ours.attention_BATK, theirs.attention_BATK * read)


@pytest.mark.parametrize(
    ("query_norm", "first_layer"),
    [
        # The second chunk runs its lower layers while the first one's search is under way.
        ("layer", ["begin 3", "begin 3", "wait 3", "wait 3"]),
        ("batch", ["begin 3", "begin 3", "wait 3", "wait 3"]),
    ],
)
def test_searches_are_begun_before_any_is_waited_for(
    query_norm: str, first_layer: list[str]
) -> None:
    memory = Background()
    step(memory, 2, query_norm=query_norm)
    assert memory.diary == first_layer * 2


def test_lower_layers_of_the_next_chunk_run_while_a_search_is_under_way() -> None:
    memory = Background()
    model = make_model(query_norm="layer")
    model.pluglm.layers[0].register_forward_hook(lambda *_: memory.diary.append("lower"))
    model(torch.ones(4, T, dtype=torch.int64), lookup=memory, retrieval_chunks=2)
    assert memory.diary[:4] == ["lower", "begin 2", "lower", "begin 2"]


def test_a_lookup_that_cannot_be_begun_is_asked_at_once() -> None:
    memory = Memory()
    step(memory, 3)
    assert memory.diary == ["ask", "ask"]


def test_a_query_that_is_not_finite_is_refused_before_it_is_asked() -> None:
    model, memory = make_model(), Background()
    with torch.no_grad():
        model.pluglm.layers[2].query_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the query of memory layer 2 holds NaN"):
        model(torch.ones(B, T, dtype=torch.int64), lookup=memory, retrieval_chunks=2)
    assert memory.diary == []


def test_what_needs_the_whole_batch_at_once_is_refused() -> None:
    model: PlugLMModel = make_model().pluglm
    ids_BT = torch.ones(B, T, dtype=torch.int64)
    for options in ({"first_only": True}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match="retrieval_chunks = 2"):
            model(ids_BT, lookup=Background(), retrieval_chunks=2, **options)
