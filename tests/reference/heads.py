"""The heads and their losses, a second time: from a sequence's last hidden states to a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.reference.formulas import binary_cross_entropy, cross_entropy, gelu, layer_norm, linear

TASKS = ("masked_lm", "sequence", "tokens", "spans")
Targets = Mapping[str, Tensor]


class ReferenceHead:
    """One of `TASKS` over hidden states.

    Args:
        task: `masked_lm`, `sequence` (classification or regression of the first position),
            `tokens` (a class for each) or `spans` (where an answer starts and ends).
        weights: as in `Reference`; the head's begin with `head.`.
        config: the model's configuration as a dictionary.
    """

    def __init__(self, task: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.task, self.w, self.c = task, weights, config

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.w[f"head.{name}.weight"], self.w[f"head.{name}.bias"])

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T,V], [classes], [T,classes] or [T,2], in the order of `TASKS`."""
        if self.task == "masked_lm":
            tied = not self.c["legacy"]
            matrix = "pluglm.embeddings.word_embeddings.weight" if tied else "head.decoder.weight"
            transformed = layer_norm(
                gelu(self.linear(hidden_TH, "dense")),
                self.w["head.LayerNorm.weight"],
                self.w["head.LayerNorm.bias"],
                self.c["layer_norm_eps"],
            )
            scores = torch.einsum("th,vh->tv", transformed, self.w[matrix])
            return scores + self.w["head.decoder_bias"]
        if self.task == "sequence":
            return self.linear(torch.tanh(self.linear(hidden_TH[0], "in_proj")), "out_proj")
        return self.linear(hidden_TH, "out_proj")

    def loss(self, logits: Tensor, targets: Targets, kept_BT: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits: `logits` of every sequence, stacked.
            targets: `labels`; for `spans` `start_positions` and `end_positions` [B].
            kept_BT: bool; an answer can start or end only where it is True.
        """
        losses: Callable[..., list[Tensor]] = getattr(self, f"_{self.task}")
        return torch.stack(losses(logits, targets, kept_BT)).mean()

    def _masked_lm(self, logits_BTV: Tensor, targets: Targets, _kept: Tensor) -> list[Tensor]:
        return _labelled(logits_BTV, targets["labels"], -1 if self.c["legacy"] else -100)

    def _tokens(self, logits_BTC: Tensor, targets: Targets, _kept: Tensor) -> list[Tensor]:
        return _labelled(logits_BTC, targets["labels"], -100)

    def _sequence(self, logits_BC: Tensor, targets: Targets, _kept: Tensor) -> list[Tensor]:
        labels = targets["labels"]
        if self.c["problem_type"] == "regression":
            wanted_BC = labels.reshape(logits_BC.shape)
            return list(((logits_BC - wanted_BC) ** 2).flatten())
        if self.c["problem_type"] == "multi_label_classification":
            pairs = zip(logits_BC.flatten(), labels.flatten().tolist(), strict=True)
            return [binary_cross_entropy(logit, label) for logit, label in pairs]
        return _labelled(logits_BC, labels, -100)

    def _spans(self, logits_BT2: Tensor, targets: Targets, kept_BT: Tensor) -> list[Tensor]:
        losses = []
        for end, name in enumerate(("start_positions", "end_positions")):
            for b, position in enumerate(targets[name].tolist()):
                allowed = kept_BT[b].nonzero().flatten().tolist()
                losses.append(
                    cross_entropy(logits_BT2[b, allowed, end], allowed.index(int(position)))
                )
        return losses


def _labelled(logits: Tensor, labels: Tensor, ignored: int) -> list[Tensor]:
    pairs = zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True)
    return [cross_entropy(row, label) for row, label in pairs if label != ignored]
