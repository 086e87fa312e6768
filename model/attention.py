"""Self-attention over the sequence, and knowledge attention over retrieved entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import PlugLMConfig

# How much a position's likeness to an entry's token counts under memory_init="copy": at 1 the
# attention over a few hundred tokens is nearly flat, at 3 the most alike stands out.
COPY_SHARPNESS = 3.0


class CopyLinear(nn.Linear):
    """A map on the path from an entry's tokens to the output, or to its key.

    `PlugLMConfig.memory_init="copy"` starts it at `scale` times the identity; a class of its own,
    because weight initialisation looks at the modules that hold parameters.
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale


class SelfAttention(nn.Module):
    """BERT's attention block: attention, output projection, dropout, residual, LayerNorm."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.probs_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """[B,T,H], bool [B,T] (True: a token) -> [B,T,H]."""
        attended = F.scaled_dot_product_attention(
            split_heads(self.query(x_BTH), self.heads),
            split_heads(self.key(x_BTH), self.heads),
            split_heads(self.value(x_BTH), self.heads),
            attn_mask=mask_BT[:, None, None, :],
            dropout_p=self.probs_dropout if self.training else 0.0,
        )
        merged: Tensor = self.LayerNorm(x_BTH + self.dropout(self.dense(merge_heads(attended))))
        return merged


class KnowledgeAttention(nn.Module):
    """Attention from positions to the values of retrieved entries, biased by query-key similarity.

    `softmax(q·k + β_h·cos)`: the bias is the only way by which the loss reaches queries and keys.
    """

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.kind = config.memory_attention
        self.heads = config.num_attention_heads if self.kind == "multi_head" else 1
        # The published code reshapes [B,A,T,d] without moving the heads back beside d, so that
        # one position's output holds parts of other positions'.
        self.mixes_positions = config.legacy and self.heads > 1
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        if self.kind != "sentence_level":
            self.beta = nn.Parameter(torch.full((self.heads,), float(config.memory_beta_init)))
            self.q_proj = CopyLinear(hidden, hidden, scale=COPY_SHARPNESS)
            self.k_proj = CopyLinear(hidden, hidden)
            self.v_proj = CopyLinear(hidden, hidden)
            self.out_proj = CopyLinear(hidden, hidden)

    def forward(
        self, a_BTH: Tensor, cos_BK: Tensor, values_BKJH: Tensor, mask_BKJ: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read the entries.

        Args:
            a_BTH: the layer's attention output (T may be a selection of positions).
            cos_BK: cosine of query and fresh keys, float32.
            values_BKJH: J vectors per entry.
            mask_BKJ: bool, False where there is no entry or no token. A sequence without any entry
                reads zeros.

        Returns:
            (memory [B,T,H] or [B,1,H], attention [B,A,T,K·J] or [B,1,1,K], before dropout).
        """
        values_BNH = values_BKJH.flatten(1, 2)
        mask_BN = mask_BKJ.flatten(1, 2)
        found_B11 = mask_BN.any(-1)[:, None, None]
        if self.kind == "sentence_level":
            probs_BN = _masked_softmax(cos_BK.repeat_interleave(mask_BKJ.shape[2], 1), mask_BN)
            memory_B1H = probs_BN.to(values_BNH.dtype).unsqueeze(1) @ values_BNH
            return memory_B1H, probs_BN[:, None, None, :]
        head_size = a_BTH.shape[-1] // self.heads
        query_BATd = split_heads(self.q_proj(a_BTH) * head_size**-0.5, self.heads)
        key_BANd = split_heads(self.k_proj(values_BNH), self.heads)
        value_BANd = split_heads(self.v_proj(values_BNH), self.heads)
        wide = cos_BK.dtype
        scores_BATN = (query_BATd @ key_BANd.transpose(-1, -2)).to(wide)
        bias_BAN = (
            self.beta.to(wide)[None, :, None]
            * cos_BK.repeat_interleave(mask_BKJ.shape[2], 1)[:, None]
        )
        probs_BATN = _masked_softmax(scores_BATN + bias_BAN[:, :, None], mask_BN[:, None, None])
        read_BATd = self.dropout(probs_BATN).to(value_BANd.dtype) @ value_BANd
        mixed = self.mixes_positions
        merged_BTH = read_BATd.reshape(a_BTH.shape) if mixed else merge_heads(read_BATd)
        # out_proj has a bias: where nothing was found nothing may be added.
        return self.out_proj(merged_BTH) * found_B11, probs_BATN


def split_heads(x_BTH: Tensor, heads: int) -> Tensor:
    """[B,T,A·d] -> [B,A,T,d]."""
    split: Tensor = x_BTH.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(x_BATd: Tensor) -> Tensor:
    """[B,A,T,d] -> [B,T,A·d]."""
    return x_BATd.transpose(1, 2).flatten(-2)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis; a row with nothing to attend to gives zeros, not NaN."""
    filled = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(filled, -1) * mask
