"""The rows of a vocabulary in `KeyTables`: what every token contributes to a key, by position.

Nearly all the time goes into one sigmoid per token, position and hidden component, so that pass is
made in few elementwise steps over one buffer that stays in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import PlugLMConfig

# Elements of the buffer, by device: half of a CPU's second-level cache (measured: from a quarter to
# the whole of it within 5 %); a GPU wants few, large steps.
_BUFFER_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
# Tokens of one matrix product.
PRODUCT_TOKENS = {"cpu": 1024, "cuda": 1 << 16}
# Below this share of |W|² + |P|² the expanded square of their sum has lost too many digits.
_CANCELLED = 1e-3


@dataclass(frozen=True)
class RowBuilder:
    """The weights that keys are made of, folded; all of one dtype and device.

    Attributes:
        word_VH: the word embeddings, as they are.
        position_SH: positions with their type, centred over H.
        project_QH: key_proj's weight times gamma. beta_key_Q, bias_Q: key_proj of beta, its bias.
        attention: the attentive pooler; None where the pooler needs no scores.
    """

    word_VH: Tensor
    position_SH: Tensor
    project_QH: Tensor
    beta_key_Q: Tensor
    bias_Q: Tensor
    eps: float
    attention: _Attention | None

    @classmethod
    def of_weights(
        cls, weights: Mapping[str, Tensor], config: PlugLMConfig, positions: int
    ) -> RowBuilder:
        """Fold the parameters of which `is_key_weight` holds, for the first `positions`."""
        position_SH = weights["embeddings.position_embeddings.weight"][:positions]
        position_SH = _centred(position_SH + weights["embeddings.token_type_embeddings.weight"][0])
        projection_QH = weights["entry_encoder.key_proj.weight"]
        attentive = config.entry_pooler == "attentive"
        return cls(
            word_VH=weights["embeddings.word_embeddings.weight"],
            position_SH=position_SH,
            project_QH=projection_QH * weights["embeddings.LayerNorm.weight"],
            beta_key_Q=projection_QH @ weights["embeddings.LayerNorm.bias"],
            bias_Q=weights["entry_encoder.key_proj.bias"].clone(),
            eps=config.layer_norm_eps,
            attention=_Attention.of_weights(weights, position_SH) if attentive else None,
        )

    def rows(self, word_tH: Tensor) -> tuple[Tensor, Tensor]:
        """What some words contribute.

        Returns:
            (keys [t,Q], A of the identity; scalars [t,S,C]: 1/sigma, and the score if C is 2).
        """
        word_tH = _centred(word_tH)
        inverse_tS = _inverse_deviation(word_tH, self.position_SH, self.eps)
        keys_tQ = word_tH @ self.project_QH.T
        if self.attention is None:
            return keys_tQ, inverse_tS.unsqueeze(-1)
        scores_tS = self.attention.scores(word_tH, inverse_tS)
        return keys_tQ, torch.stack((inverse_tS, scores_tS), dim=-1)


@dataclass(frozen=True)
class _Attention:
    """The attentive pooler with the embeddings' gamma and beta folded in.

    `w2·tanh(z) + b2` is computed as `2 w2·sigmoid(2z) + (b2 - sum of w2)`: sigmoid takes a tenth of
    tanh's time, and the doubling of its argument is folded into the weights.
    """

    project_HH: Tensor
    position_SH: Tensor
    offset_H: Tensor
    weight_H: Tensor
    bias: Tensor

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor], position_SH: Tensor) -> _Attention:
        first_HH, first_bias_H, second_1H, second_bias = (
            weights[f"entry_encoder.pooler.{name}"]
            for name in ("att_fc1.weight", "att_fc1.bias", "att_fc2.weight", "att_fc2.bias")
        )
        project_HH = 2 * first_HH * weights["embeddings.LayerNorm.weight"]
        return cls(
            project_HH=project_HH,
            position_SH=position_SH @ project_HH.T,
            offset_H=2 * (first_HH @ weights["embeddings.LayerNorm.bias"] + first_bias_H),
            weight_H=2 * second_1H[0],
            bias=second_bias - second_1H.sum(),
        )

    def scores(self, word_tH: Tensor, inverse_tS: Tensor) -> Tensor:
        """Scores [t,S] of centred words at all positions; `inverse_tS` is 1/sigma."""
        words_tH = word_tH @ self.project_HH.T
        scores_tS = torch.empty_like(inverse_tS)
        positions, hidden = self.position_SH.shape
        step = max(1, _BUFFER_ELEMENTS[words_tH.device.type] // (positions * hidden))
        buffer = words_tH.new_empty(min(step, len(words_tH)), positions, hidden)
        for words_t1H, inverse_tS1, out_tS in zip(
            words_tH.unsqueeze(1).split(step),
            inverse_tS.unsqueeze(2).split(step),
            scores_tS.split(step),
            strict=True,
        ):
            vectors_tSH = buffer[: len(words_t1H)]
            torch.add(self.position_SH, words_t1H, out=vectors_tSH)
            torch.addcmul(self.offset_H, vectors_tSH, inverse_tS1, out=vectors_tSH)
            vectors_tSH.sigmoid_()
            torch.mv(vectors_tSH.view(-1, hidden), self.weight_H, out=out_tS.view(-1))
        return scores_tS.add_(self.bias)


def _centred(rows_H: Tensor) -> Tensor:
    return rows_H - rows_H.mean(-1, keepdim=True)


def _inverse_deviation(word_tH: Tensor, position_SH: Tensor, eps: float) -> Tensor:
    """1/sigma [t,S] of the sums of centred words and positions, as LayerNorm computes it."""
    hidden = word_tH.shape[1]
    squares_tS = word_tH.square().sum(-1)[:, None] + position_SH.square().sum(-1)
    variance_tS = torch.addmm(squares_tS, word_tH, position_SH.T, alpha=2.0) / hidden
    words, positions = (variance_tS < _CANCELLED / hidden * squares_tS).nonzero(as_tuple=True)
    if len(words):  # a word that nearly undoes a position; in blocks, as there may be many
        for some in torch.arange(len(words), device=words.device).split(4096):
            sums = word_tH[words[some]] + position_SH[positions[some]]
            variance_tS[words[some], positions[some]] = sums.square().mean(-1)
    return torch.rsqrt(variance_tS + eps)
