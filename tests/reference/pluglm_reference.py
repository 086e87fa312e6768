"""PlugLM written a second time: straight from the formulas, in float64, one sequence at a time.

It shares no code with `model/`: its own softmax, GELU, LayerNorm, BatchNorm, cosine and retrieval
(a full sort of all stored keys). It takes the model's weights by name and is differentiable, so
that values, ids and gradients can be compared. Slow on purpose.

Shape suffixes: B batch, T tokens, H hidden, d head, K retrieved, S entry tokens, Q key width,
N entries, J vectors of one entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StoredMemory:
    """Entries with the (possibly stale) keys by which they are found."""

    keys_NQ: Tensor
    tokens_NS: Tensor
    ids_N: Tensor


@dataclass(kw_only=True)
class Result:
    """What one pass gives; `values` holds every intermediate as `layer{i}.{name}`."""

    logits_BTV: Tensor
    loss: Tensor | None
    ids: list[Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """The formulas, with the weights that they use.

    Args:
        weights: parameters and buffers named as in `PlugLMForMaskedLM`, float64; those that require
            a gradient get one from `Result.loss.backward()`.
        config: the model's configuration as a dictionary.
        training: BatchNorm uses the batch's statistics and moves the running ones.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], config: Mapping[str, Any], *, training: bool
    ) -> None:
        self.w = weights
        self.c = config
        self.training = training

    def run(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        types_BT: Tensor,
        labels_BT: Tensor | None = None,
        memory: StoredMemory | None = None,
        k: int = 0,
    ) -> Result:
        """Everything, from token ids to the loss."""
        result = Result(logits_BTV=torch.empty(0), loss=None, ids=[])
        sequences = [
            self.embed(ids, types) for ids, types in zip(input_ids_BT, types_BT, strict=True)
        ]
        result.values["embeddings"] = torch.stack(sequences)
        masks = [row.bool() for row in mask_BT]
        plain = self.c["num_hidden_layers"] - self.c["num_memory_layers"]
        for i in range(self.c["num_hidden_layers"]):
            name = f"pluglm.layers.{i}"
            if i < plain:
                sequences = [
                    self.plain_layer(x, m, name) for x, m in zip(sequences, masks, strict=True)
                ]
            else:
                sequences = self.memory_layer(sequences, masks, i, memory, k, result)
            result.values[f"layer{i}.output"] = torch.stack(sequences)
        result.logits_BTV = torch.stack([self.head(x) for x in sequences])
        if labels_BT is not None:
            result.loss = self.cross_entropy(result.logits_BTV, labels_BT)
        return result

    # --- the parts of BERT ---------------------------------------------------------------------

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.w[f"{name}.weight"]) + self.w[f"{name}.bias"]

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return (x - mean) / (variance + eps) ** 0.5 * self.w[f"{name}.weight"] + self.w[
            f"{name}.bias"
        ]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.layer_norm(x, name, self.c["layer_norm_eps"])

    def embed(self, ids_T: Tensor, types_T: Tensor | None = None) -> Tensor:
        """W[ids] + P[0, 1, ...] + E[type], normalised. The pad token's row is not trained here."""
        prefix = "pluglm.embeddings"
        words = self.w[f"{prefix}.word_embeddings.weight"]
        pad_T1 = (ids_T == self.c["pad_token_id"])[:, None]
        word_TH = torch.where(pad_T1, words.detach()[ids_T], words[ids_T])
        place_TH = self.w[f"{prefix}.position_embeddings.weight"][: len(ids_T)]
        types_T = torch.zeros_like(ids_T) if types_T is None else types_T
        type_TH = self.w[f"{prefix}.token_type_embeddings.weight"][types_T]
        return self.norm(word_TH + place_TH + type_TH, f"{prefix}.LayerNorm")

    def self_attention(self, x_TH: Tensor, mask_T: Tensor, name: str) -> Tensor:
        heads = self.c["num_attention_heads"]
        size = x_TH.shape[-1] // heads
        q, k, v = (self.linear(x_TH, f"{name}.{part}") for part in ("query", "key", "value"))
        read = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores_Tn = torch.einsum("td,nd->tn", q[:, part], k[mask_T, part]) / math.sqrt(size)
            read.append(torch.einsum("tn,nd->td", softmax(scores_Tn), v[mask_T, part]))
        out = self.linear(torch.cat(read, -1), f"{name}.dense")
        return self.norm(x_TH + out, f"{name}.LayerNorm")

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        return self.linear(gelu(self.linear(x, f"{name}.dense_in")), f"{name}.dense_out")

    def plain_layer(self, x_TH: Tensor, mask_T: Tensor, name: str) -> Tensor:
        a_TH = self.self_attention(x_TH, mask_T, f"{name}.attention")
        return self.norm(a_TH + self.feed_forward(a_TH, f"{name}.ffn"), f"{name}.LayerNorm")

    def head(self, x: Tensor) -> Tensor:
        tied = not self.c["legacy"]
        matrix = "pluglm.embeddings.word_embeddings.weight" if tied else "head.decoder.weight"
        transformed = self.norm(gelu(self.linear(x, "head.dense")), "head.LayerNorm")
        return torch.einsum("th,vh->tv", transformed, self.w[matrix]) + self.w["head.decoder_bias"]

    def cross_entropy(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean over labelled positions of log Σ exp(logits) - logits[label]."""
        ignored = -1 if self.c["legacy"] else -100
        losses = []
        for row, label in zip(logits_BTV.flatten(0, 1), labels_BT.flatten().tolist(), strict=True):
            if label != ignored:
                top = row.max().detach()
                losses.append((row - top).exp().sum().log() + top - row[label])
        return torch.stack(losses).mean()

    # --- the memory ----------------------------------------------------------------------------

    def pool(self, x_TH: Tensor, mask_T: Tensor, name: str) -> Tensor:
        """a_t = exp(w2·tanh(W1 x_t + b1) + b2)·mask_t; Σ a_t x_t / (Σ a_t + 1e-8), as it stands."""
        inner_TH = torch.tanh(self.linear(x_TH, f"{name}.att_fc1"))
        a_T = torch.exp(self.linear(inner_TH, f"{name}.att_fc2")[:, 0]) * mask_T
        return torch.einsum("t,th->h", a_T, x_TH) / (a_T.sum() + 1e-8)

    def encode_entry(self, tokens_S: Tensor) -> tuple[Tensor, Tensor]:
        """(key [Q], values [J,H]); J is the number of tokens for value_pooling "tokens", else 1."""
        name = "pluglm.entry_encoder"
        kept_S = tokens_S != self.c["pad_token_id"]
        embedded_SH = self.embed(tokens_S)
        pooled_H = self.pool(embedded_SH, kept_S, f"{name}.pooler")
        key_Q = self.linear(pooled_H, f"{name}.key_proj")
        pooling = self.c["value_pooling"]
        if pooling == "tokens":
            return key_Q, self.linear(embedded_SH[kept_S], f"{name}.value_proj")
        if pooling == "separate":
            pooled_H = self.pool(embedded_SH, kept_S, f"{name}.value_pooler")
        return key_Q, self.linear(pooled_H, f"{name}.value_proj")[None]

    def queries(self, raw: list[Tensor], name: str, result: Result) -> list[Tensor]:
        kind = self.c["query_norm"]
        if kind == "none":
            return raw
        if kind == "layer":
            return [self.layer_norm(q, name, 1e-5) for q in raw]
        mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        if self.training:
            n = len(raw)
            batch_mean = torch.stack(raw).sum(0) / n
            squares = torch.stack([(q - batch_mean) ** 2 for q in raw]).sum(0)
            result.running[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean.detach()
            result.running[f"{name}.running_var"] = 0.9 * variance + 0.1 * squares.detach() / (
                n - 1
            )
            mean, variance = batch_mean, squares / n
        scale, shift = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return [(q - mean) / (variance + 1e-5) ** 0.5 * scale + shift for q in raw]

    def memory_layer(
        self,
        sequences: list[Tensor],
        masks: list[Tensor],
        index: int,
        memory: StoredMemory | None,
        k: int,
        result: Result,
    ) -> list[Tensor]:
        name = f"pluglm.layers.{index}"
        attended = [
            self.self_attention(x, m, f"{name}.attention")
            for x, m in zip(sequences, masks, strict=True)
        ]
        small = [
            self.feed_forward(a, f"{name}.ffn")
            if self.c["memory_ffn_size"]
            else torch.zeros_like(a)
            for a in attended
        ]
        report = {"attention_output": torch.stack(attended), "ffn_output": torch.stack(small)}
        read = [torch.zeros_like(a) for a in attended]
        if memory is not None:
            pooled = [
                self.pool(a, m, f"{name}.pooler") for a, m in zip(attended, masks, strict=True)
            ]
            raw = [self.linear(p, f"{name}.query_proj") for p in pooled]
            queries = self.queries(raw, f"{name}.query_norm", result)
            rows = [nearest(q, memory, k) for q in queries]
            result.ids.append(
                torch.tensor(
                    [[int(memory.ids_N[r]) for r in row] + [-1] * (k - len(row)) for row in rows]
                )
            )
            keys = []
            for b, (a_TH, query, row) in enumerate(zip(attended, queries, rows, strict=True)):
                entries = [self.encode_entry(memory.tokens_NS[r]) for r in row]
                read[b] = self.knowledge_attention(
                    a_TH, query, entries, f"{name}.knowledge_attention"
                )
                keys.append(torch.stack([key for key, _ in entries]))
            report |= {
                "pooled": torch.stack(pooled),
                "query_pre_batchnorm": torch.stack(raw),
                "query": torch.stack(queries),
                "key": torch.stack(keys),
            }
        report["memory_output"] = torch.stack(read)
        result.values |= {f"layer{index}.{part}": value for part, value in report.items()}
        return [
            self.norm(a + f + r, f"{name}.LayerNorm")
            for a, f, r in zip(attended, small, read, strict=True)
        ]

    def knowledge_attention(
        self, a_TH: Tensor, query_Q: Tensor, entries: list[tuple[Tensor, Tensor]], name: str
    ) -> Tensor:
        vectors = [
            (cosine(query_Q, key_Q), value_H)
            for key_Q, values_JH in entries
            for value_H in values_JH
        ]
        if not vectors:
            return torch.zeros_like(a_TH)
        cos_n = torch.stack([c for c, _ in vectors])
        values_nH = torch.stack([v for _, v in vectors])
        if self.c["memory_attention"] == "sentence_level":
            return torch.einsum("n,nh->h", softmax(cos_n), values_nH).expand_as(a_TH)
        heads = self.c["num_attention_heads"] if self.c["memory_attention"] == "multi_head" else 1
        size = a_TH.shape[-1] // heads
        q_TH = self.linear(a_TH, f"{name}.q_proj") * size**-0.5
        k_nH = self.linear(values_nH, f"{name}.k_proj")
        v_nH = self.linear(values_nH, f"{name}.v_proj")
        read = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            bias_n = self.w[f"{name}.beta"][h] * cos_n
            scores_Tn = torch.einsum("td,nd->tn", q_TH[:, part], k_nH[:, part]) + bias_n
            read.append(torch.einsum("tn,nd->td", softmax(scores_Tn), v_nH[:, part]))
        if self.c["legacy"]:
            # The published code lays the heads' [T,d] blocks one after the other and cuts anew.
            merged_TH = torch.cat([r.flatten() for r in read]).view_as(a_TH)
        else:
            merged_TH = torch.cat(read, -1)
        return self.linear(merged_TH, f"{name}.out_proj")


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), with the normal distribution's own Φ."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """x·y / (max(|x|, 1e-8)·max(|y|, 1e-8))."""
    lengths = [(v * v).sum().sqrt().clamp(min=1e-8) for v in (x, y)]
    return (x * y).sum() / (lengths[0] * lengths[1])


def nearest(query_Q: Tensor, memory: StoredMemory, k: int) -> list[int]:
    """Rows of the k entries with the largest stored key · query; ties: the lower id first."""
    scores = torch.einsum("q,nq->n", query_Q.detach(), memory.keys_NQ.to(query_Q)).tolist()
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], int(memory.ids_N[row])))
    return order[:k]


def cloze_loss(
    queries_BQ: Tensor, positive_BQ: Tensor, positive_ids_B: Tensor, doc_ids_B: Tensor
) -> Tensor:
    """The retrieval warm-up loss, query by query; 0 if no sequence has a right entry."""
    losses = []
    scale = math.sqrt(queries_BQ.shape[-1])
    for b, query_Q in enumerate(queries_BQ):
        if int(positive_ids_B[b]) < 0:
            continue
        right = query_Q @ positive_BQ[b] / scale
        wrong = [
            query_Q @ positive_BQ[other] / scale
            for other in range(len(queries_BQ))
            if int(positive_ids_B[other]) >= 0 and int(doc_ids_B[other]) != int(doc_ids_B[b])
        ]
        losses.append(torch.logsumexp(torch.stack([right, *wrong]), 0) - right)
    return torch.stack(losses).mean() if losses else 0.0 * queries_BQ.sum()
