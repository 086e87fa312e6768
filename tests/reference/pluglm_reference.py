"""PlugLM written a second time: straight from the formulas, in float64, one sequence at a time.

It shares no code with `model/`: its own softmax, GELU, LayerNorm, BatchNorm, cosine and retrieval
(a full sort of all stored keys). It takes the model's weights by name and is differentiable, so
that values, ids and gradients can be compared. Slow on purpose: an entry is encoded as often as it
is retrieved, and a position that holds no token does not exist (in the published layout it does:
there the heads' blocks are cut anew over all positions).

Shape suffixes: B batch, T tokens, H hidden, d head, K retrieved, S entry tokens, Q key width,
N entries, J vectors of one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.formulas import cosine, nearest, softmax
from tests.reference.heads import ReferenceHead
from tests.reference.layers import ReferenceLayers, Sequence, stacked


@dataclass(frozen=True, kw_only=True)
class StoredMemory:
    """Entries with the (possibly stale) keys by which they are found, and values, if stored."""

    keys_NQ: Tensor
    tokens_NS: Tensor
    ids_N: Tensor
    values_NJH: Tensor | None = None


@dataclass(kw_only=True)
class Result:
    """What one pass gives; `values` holds every intermediate as `layer{i}.{name}`.

    Positions that hold no token are zeros in `values`, but for the published layout.
    """

    logits: Tensor
    loss: Tensor | None
    ids: list[Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)


class Reference(ReferenceLayers):
    """The formulas, with the weights that they use.

    Args:
        weights: parameters and buffers named as in the model with a head, float64; those that
            require a gradient get one from `Result.loss.backward()`.
        config: the model's configuration as a dictionary.
        training: BatchNorm uses the batch's statistics and moves the running ones.
        task: which head follows.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        training: bool,
        task: str = "masked_lm",
    ) -> None:
        super().__init__(weights, config)
        self.training = training
        self.head = ReferenceHead(task, weights, config)

    def run(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        types_BT: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        memory: StoredMemory | None = None,
        k: int = 0,
    ) -> Result:
        """Everything, from token ids to the loss of `targets` (`labels`, or the spans')."""
        result = Result(logits=torch.empty(0), loss=None, ids=[])
        kept_BT = mask_BT.bool()
        computed_BT = torch.ones_like(kept_BT) if self.c["legacy"] else kept_BT
        rows = [
            Sequence(positions_t=c.nonzero()[:, 0], tokens_t=m[c], length=len(m))
            for c, m in zip(computed_BT, kept_BT, strict=True)
        ]
        xs = [
            self.embed(ids[s.positions_t], types[s.positions_t], s.positions_t)
            for ids, types, s in zip(input_ids_BT, types_BT, rows, strict=True)
        ]
        result.values["embeddings"] = stacked(rows, xs)
        plain = self.c["num_hidden_layers"] - self.c["num_memory_layers"]
        for i in range(self.c["num_hidden_layers"]):
            if i < plain:
                name = f"pluglm.layers.{i}"
                xs = [self.plain_layer(x, s.tokens_t, name) for x, s in zip(xs, rows, strict=True)]
            else:
                xs = self.memory_layer(xs, rows, i, memory, k, result)
            result.values[f"layer{i}.output"] = stacked(rows, xs)
        result.values["last_hidden_state"] = stacked(rows, xs)
        result.logits = torch.stack([self.head.logits(x_TH) for x_TH in stacked(rows, xs)])
        if targets is not None:
            result.loss = self.head.loss(result.logits, targets, kept_BT)
        return result

    def encode_entry(self, tokens_S: Tensor) -> tuple[Tensor, Tensor]:
        """(key [Q], values [J,H]); J is the number of tokens for value_pooling "tokens", else 1."""
        name, kind = "pluglm.entry_encoder", self.c["entry_pooler"]
        places_n = (tokens_S != self.c["pad_token_id"]).nonzero()[:, 0]
        x_nH = self.embed(tokens_S[places_n], torch.zeros_like(places_n), places_n)
        kept_n = torch.ones(len(places_n), dtype=torch.bool)
        if self.c["entry_encoder"] == "first_n" and len(places_n):
            for i in range(self.c["entry_encoder_layers"]):
                x_nH = self.plain_layer(x_nH, kept_n, f"pluglm.layers.{i}")
        pooled_H = self.pool(x_nH, kept_n, kind, f"{name}.pooler")
        key_Q = self.linear(pooled_H, f"{name}.key_proj")
        pooling = self.c["value_pooling"]
        if pooling == "tokens":
            return key_Q, self.linear(x_nH, f"{name}.value_proj")
        if pooling == "separate":
            pooled_H = self.pool(x_nH, kept_n, kind, f"{name}.value_pooler")
        return key_Q, self.linear(pooled_H, f"{name}.value_proj")[None]

    def entry(self, memory: StoredMemory, row: int) -> tuple[Tensor, Tensor]:
        """(key, values): encoded with the weights as they are now, or as the memory keeps them."""
        key_Q, values_JH = self.encode_entry(memory.tokens_NS[row])
        if self.c["fixed_keys"]:
            key_Q = memory.keys_NQ[row].to(key_Q)
        if self.c["fixed_values"]:
            assert memory.values_NJH is not None
            stored_JH = memory.values_NJH[row].to(values_JH)
            if self.c["value_pooling"] == "tokens":
                stored_JH = stored_JH[memory.tokens_NS[row] != self.c["pad_token_id"]]
            values_JH = stored_JH
        return key_Q, values_JH

    def queries(self, raw: list[Tensor], name: str, result: Result) -> list[Tensor]:
        kind = self.c["query_norm"]
        if kind == "none":
            return raw
        if kind == "layer":
            return [self.norm(q, name, 1e-5) for q in raw]
        mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        if self.training:
            n = len(raw)
            batch_mean = torch.stack(raw).sum(0) / n
            squares = torch.stack([(q - batch_mean) ** 2 for q in raw]).sum(0)
            moved = {
                "running_mean": (mean, batch_mean),
                "running_var": (variance, squares / (n - 1)),
            }
            for part, (old, new) in moved.items():
                result.running[f"{name}.{part}"] = 0.9 * old + 0.1 * new.detach()
            mean, variance = batch_mean, squares / n
        scale, shift = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return [(q - mean) / (variance + 1e-5) ** 0.5 * scale + shift for q in raw]

    def memory_layer(
        self,
        xs: list[Tensor],
        rows: list[Sequence],
        index: int,
        memory: StoredMemory | None,
        k: int,
        result: Result,
    ) -> list[Tensor]:
        name = f"pluglm.layers.{index}"
        attended = [
            self.self_attention(x, s.tokens_t, f"{name}.attention")
            for x, s in zip(xs, rows, strict=True)
        ]
        small = [
            self.feed_forward(a, f"{name}.ffn")
            if self.c["memory_ffn_size"]
            else torch.zeros_like(a)
            for a in attended
        ]
        report = {"attention_output": stacked(rows, attended), "ffn_output": stacked(rows, small)}
        read = [torch.zeros_like(a) for a in attended]
        if memory is not None:
            pooled = [
                self.pool(a, s.tokens_t, self.c["query_pooler"], f"{name}.pooler")
                for a, s in zip(attended, rows, strict=True)
            ]
            raw = [self.linear(p, f"{name}.query_proj") for p in pooled]
            queries = self.queries(raw, f"{name}.query_norm", result)
            found = [nearest(q, memory.keys_NQ, memory.ids_N, k) for q in queries]
            pads = [-1] * (k - min(k, len(memory.ids_N)))
            result.ids.append(
                torch.tensor([[int(memory.ids_N[r]) for r in hits] + pads for hits, _ in found])
            )
            keys, values = [], []
            for b, (a_tH, query, (hits, _)) in enumerate(
                zip(attended, queries, found, strict=True)
            ):
                entries = [self.entry(memory, r) for r in hits]
                read[b] = self.knowledge_attention(
                    a_tH, query, entries, f"{name}.knowledge_attention"
                )
                keys.append(torch.stack([key for key, _ in entries]))
                values += [value_JH for _, value_JH in entries]
            report |= {
                "pooled": torch.stack(pooled),
                "query_pre_batchnorm": torch.stack(raw),
                "query": torch.stack(queries),
                "topk_scores": torch.stack([scores for _, scores in found]),
                "key": torch.stack(keys),
                "value": torch.cat(values),
            }
        report["memory_output"] = stacked(rows, read)
        result.values |= {f"layer{index}.{part}": value for part, value in report.items()}
        return [
            self.norm(a + f + r, f"{name}.LayerNorm")
            for a, f, r in zip(attended, small, read, strict=True)
        ]

    def knowledge_attention(
        self, a_tH: Tensor, query_Q: Tensor, entries: list[tuple[Tensor, Tensor]], name: str
    ) -> Tensor:
        vectors = [
            (cosine(query_Q, key_Q), value_H)
            for key_Q, values_JH in entries
            for value_H in values_JH
        ]
        if not vectors:
            return torch.zeros_like(a_tH)
        cos_n = torch.stack([c for c, _ in vectors])
        values_nH = torch.stack([v for _, v in vectors])
        if self.c["memory_attention"] == "sentence_level":
            return (softmax(cos_n) @ values_nH).expand_as(a_tH)
        heads = self.c["num_attention_heads"] if self.c["memory_attention"] == "multi_head" else 1
        size = a_tH.shape[-1] // heads
        q_tH = self.linear(a_tH, f"{name}.q_proj") * size**-0.5
        k_nH = self.linear(values_nH, f"{name}.k_proj")
        v_nH = self.linear(values_nH, f"{name}.v_proj")
        read = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            bias_n = self.w[f"{name}.beta"][h] * cos_n
            scores_tn = q_tH[:, part] @ k_nH[:, part].T + bias_n
            read.append(softmax(scores_tn) @ v_nH[:, part])
        if self.c["legacy"]:
            # The published code lays the heads' [T,d] blocks one after the other and cuts anew.
            merged_tH = torch.cat([r.flatten() for r in read]).view_as(a_tH)
        else:
            merged_tH = torch.cat(read, -1)
        return self.linear(merged_tH, f"{name}.out_proj")
