"""The formulas that the reference is made of, each as it is written in a paper, in float64.

Nothing here comes from `model/`, and no function is shared with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), with the normal distribution's own Φ."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last axis."""
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps) ** 0.5 * weight + bias


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """x·y / (max(|x|, 1e-8)·max(|y|, 1e-8))."""
    lengths = [(v * v).sum().sqrt().clamp(min=1e-8) for v in (x, y)]
    return (x * y).sum() / (lengths[0] * lengths[1])


def attentive_weights(scores_t: Tensor) -> Tensor:
    """exp(s_t) / (Σ exp(s) + 1e-8), by logarithms, so that no score is too large."""
    total = torch.logaddexp(
        torch.logsumexp(scores_t, 0), torch.tensor(1e-8, dtype=scores_t.dtype).log()
    )
    return torch.exp(scores_t - total)


def nearest(query_Q: Tensor, keys_NQ: Tensor, ids_N: Tensor, k: int) -> tuple[list[int], Tensor]:
    """Rows of the k entries with the largest key · query, and these products; no gradient.

    Ties: the lower id first.
    """
    scores_N = torch.einsum("q,nq->n", query_Q.detach(), keys_NQ.to(query_Q))
    scores = scores_N.tolist()
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], int(ids_N[row])))[:k]
    return order, scores_N[order]


def cross_entropy(logits_C: Tensor, label: int) -> Tensor:
    """log Σ exp(logits) - logits[label]."""
    top = logits_C.max().detach()
    return (logits_C - top).exp().sum().log() + top - logits_C[label]


def binary_cross_entropy(logit: Tensor, label: float) -> Tensor:
    """-[y log p + (1-y) log (1-p)], p = 1/(1+exp(-logit)), for the moderate logits of a test."""
    right, wrong = 1 / (1 + torch.exp(-logit)), 1 / (1 + torch.exp(logit))
    return -(label * right.log() + (1 - label) * wrong.log())


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
