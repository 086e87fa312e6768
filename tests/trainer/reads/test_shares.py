"""An entry's share of a sequence's attention: over its tokens that ask, and over nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMConfig, PlugLMForMaskedLM
from trainer.reads.shares import entry_shares, reads_of

V, T, N, S, K = 40, 7, 12, 5, 3


@dataclass(frozen=True)
class Found:
    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


class Memory:
    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.tokens_NS = torch.randint(1, V, (N, S), generator=random)
        self.keys_NQ = torch.randn(N, 4, generator=random)

    def __call__(self, queries_BQ: Tensor) -> Found:
        ids_BK = (queries_BQ @ self.keys_NQ.T).topk(K, dim=1).indices
        return Found(ids_BK, self.tokens_NS[ids_BK], ids_BK)

    def start(self, queries_BQ: Tensor) -> Any:
        return lambda: self(queries_BQ)


def model(**options: Any) -> PlugLMForMaskedLM:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "memory_ffn_size": 16,
        "num_memory_layers": 2,
        "key_size": 4,
        "max_position_embeddings": 16,
        "query_norm": "layer",
        "initializer_range": 0.5,
    }
    built = PlugLMForMaskedLM(PlugLMConfig(**{**sizes, **options}))
    built.train(False)
    return built


def batch() -> dict[str, Tensor]:
    """Sequences of 3 to 7 tokens with one to three masks, the first without any."""
    random = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(1, V, (6, T), generator=random)
    labels_BT = torch.full_like(ids_BT, -100)
    mask_BT = torch.zeros_like(ids_BT)
    for row, length in enumerate((3, 7, 4, 5, 7, 6)):
        mask_BT[row, :length] = 1
        labels_BT[row, 1 : 1 + row % 4] = 5
    return {"input_ids": ids_BT * mask_BT, "attention_mask": mask_BT, "labels": labels_BT}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["multi_head", "single_head", "sentence_level"])
def test_shares_are_the_mean_over_the_positions_that_ask(kind: str, chunks: int) -> None:
    value_pooling = "separate" if kind == "sentence_level" else "tokens"
    built = model(memory_attention=kind, value_pooling=value_pooling)
    given = batch()
    with torch.no_grad():
        output = built(**given, lookup=Memory(), output_attention=True, retrieval_chunks=chunks)
        # Without labels every position is computed: an independent way to the same numbers.
        inputs = (given["input_ids"], given["attention_mask"])
        whole = built(*inputs, lookup=Memory(), output_attention=True)
    first, last = output.retrievals
    masked_BT, tokens_BT = given["labels"] != -100, given["attention_mask"].bool()
    for retrieval, told, asking_BT in (
        (first, whole.retrievals[0], tokens_BT),
        (last, whole.retrievals[1], masked_BT),
    ):
        shares_BK = entry_shares(retrieval)
        for row, asking_T in enumerate(asking_BT):
            attention_ATK = told.attention_BATK[row]
            if kind == "sentence_level":
                wanted_K = attention_ATK[0, 0]
            elif asking_T.any():
                wanted_K = attention_ATK[:, asking_T].mean((0, 1))
            else:
                wanted_K = torch.zeros(K)
            torch.testing.assert_close(shares_BK[row], wanted_K, rtol=1e-4, atol=1e-6)


def test_a_passes_reads_are_told_by_layer() -> None:
    output = model()(**batch(), lookup=Memory(), output_attention=True)
    told = reads_of(output.retrievals)
    assert len(told) == 2
    for (ids, shares), retrieval in zip(told, output.retrievals, strict=True):
        assert ids.tolist() == retrieval.retrieved.ids.flatten().tolist()
        assert shares.shape == ids.shape
        assert not shares.requires_grad
