"""What the reference is built of: sequences without their padding, BERT's layers, the poolers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.formulas import attentive_weights, gelu, layer_norm, linear, softmax


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Which positions of a row are computed, and which of these are tokens."""

    positions_t: Tensor
    tokens_t: Tensor
    length: int

    def laid_out(self, x_tH: Tensor) -> Tensor:
        """Back to all T positions, zeros where nothing was computed."""
        row_TH = x_tH.new_zeros(self.length, x_tH.shape[-1])
        return row_TH.index_put((self.positions_t,), x_tH)


def stacked(rows: list[Sequence], xs: list[Tensor]) -> Tensor:
    """[B,T,H] of sequences whose padding may not have been computed."""
    return torch.stack([s.laid_out(x) for s, x in zip(rows, xs, strict=True)])


class ReferenceLayers:
    """BERT's parts, for one sequence, with the weights under the model's names.

    Args:
        weights: parameters and buffers, float64.
        config: the model's configuration as a dictionary.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.w = weights
        self.c = config

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.c["layer_norm_eps"] if eps is None else eps
        return layer_norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def embed(self, ids_t: Tensor, types_t: Tensor, positions_t: Tensor) -> Tensor:
        """W[ids] + P[positions] + E[types], normalised. The pad token's row is not trained here."""
        prefix = "pluglm.embeddings"
        words = self.w[f"{prefix}.word_embeddings.weight"]
        pad_t1 = (ids_t == self.c["pad_token_id"])[:, None]
        word_tH = torch.where(pad_t1, words.detach()[ids_t], words[ids_t])
        place_tH = self.w[f"{prefix}.position_embeddings.weight"][positions_t]
        type_tH = self.w[f"{prefix}.token_type_embeddings.weight"][types_t]
        return self.norm(word_tH + place_tH + type_tH, f"{prefix}.LayerNorm")

    def self_attention(self, x_tH: Tensor, tokens_t: Tensor, name: str) -> Tensor:
        heads = self.c["num_attention_heads"]
        size = x_tH.shape[-1] // heads
        q, k, v = (self.linear(x_tH, f"{name}.{part}") for part in ("query", "key", "value"))
        read = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores_tn = q[:, part] @ k[tokens_t, part].T / math.sqrt(size)
            read.append(softmax(scores_tn) @ v[tokens_t, part])
        out = self.linear(torch.cat(read, -1), f"{name}.dense")
        return self.norm(x_tH + out, f"{name}.LayerNorm")

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        return self.linear(gelu(self.linear(x, f"{name}.dense_in")), f"{name}.dense_out")

    def plain_layer(self, x_tH: Tensor, tokens_t: Tensor, name: str) -> Tensor:
        a_tH = self.self_attention(x_tH, tokens_t, f"{name}.attention")
        return self.norm(a_tH + self.feed_forward(a_tH, f"{name}.ffn"), f"{name}.LayerNorm")

    def pool(self, x_tH: Tensor, tokens_t: Tensor, kind: str, name: str) -> Tensor:
        """One vector for the tokens among x; zeros if there is none."""
        kept_nH = x_tH[tokens_t]
        if not len(kept_nH):
            return x_tH.new_zeros(x_tH.shape[-1])
        if kind == "mean":
            return kept_nH.sum(0) / len(kept_nH)
        if kind == "max":
            return kept_nH.max(0).values
        if kind == "cls":
            return x_tH[0] * tokens_t[0]
        inner_nH = torch.tanh(self.linear(kept_nH, f"{name}.att_fc1"))
        weights_n = attentive_weights(self.linear(inner_nH, f"{name}.att_fc2")[:, 0])
        return weights_n @ kept_nH
