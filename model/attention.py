"""Self-attention over the sequence, and knowledge attention over retrieved entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import PlugLMConfig
from model.rows import Rows, Selection

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


class AbsorbableLinear(CopyLinear):
    """A projection of entries that can be applied to what reads them instead.

    `q·(W v) = (Wᵀ q)·v` and `Σ p_j (W v_j) = W Σ p_j v_j`: with few asking positions it is cheaper
    to map these than every vector of every entry. One call for each side, because code which wraps
    modules from outside (ZeRO-3) must see the weight used inside the module's own call.
    """

    def forward(self, x: Tensor, *, absorb: str = "", shares: Tensor | None = None) -> Tensor:
        """Project.

        Args:
            x: [..., H] for absorb "" (the plain map); [..., A, d] for "query"; [..., A, H] for
                "read".
            absorb: "query" maps queries by the transposed weight of their head, to [..., A, H] (the
                bias adds the same to all scores of a query, which softmax does not see); "read"
                maps what was read by the weight of its head, to [..., A, d].
            shares: [..., A], for "read": the sum of the weights that x was read with, which is what
                the bias counts (dropout and empty sequences leave other sums than one).
        """
        if not absorb:
            projected: Tensor = super().forward(x)
            return projected
        heads = x.shape[-2]
        weight_AdH = self.weight.unflatten(0, (heads, -1))
        if absorb == "query":
            # The bias has a gradient of zero either way; it must have one, since ranks that reduce
            # gradients together may map different sides.
            return torch.einsum("...ad,adh->...ah", x, weight_AdH) + 0.0 * self.bias.sum()
        assert shares is not None
        bias_Ad: Tensor = self.bias.unflatten(0, (heads, -1))
        return torch.einsum("...ah,adh->...ad", x, weight_AdH) + bias_Ad * shares.unsqueeze(-1)


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

    def forward(self, x: Tensor, rows: Rows, chosen: Selection | None = None) -> Tensor:
        """Attend.

        Args:
            x: [B,T,H], or [n,H] where `rows` packs.
            rows: the layout of x.
            chosen: the only positions whose output is wanted.

        Returns:
            Like x, or [m,H] of the chosen positions.
        """
        asking, asking_rows = x, rows
        if chosen is not None:
            asking, asking_rows = chosen.take(rows.unpack(x)), chosen.rows
        attended_BATd = F.scaled_dot_product_attention(
            split_heads(asking_rows.unpack(self.query(asking)), self.heads),
            split_heads(rows.unpack(self.key(x)), self.heads),
            split_heads(rows.unpack(self.value(x)), self.heads),
            attn_mask=rows.attention_mask,
            dropout_p=self.probs_dropout if self.training else 0.0,
        )
        attended = self.dense(asking_rows.pack(merge_heads(attended_BATd)))
        merged: Tensor = self.LayerNorm(asking + self.dropout(attended))
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
            self.k_proj = AbsorbableLinear(hidden, hidden)
            self.v_proj = AbsorbableLinear(hidden, hidden)
            self.out_proj = CopyLinear(hidden, hidden)

    def forward(
        self, a: Tensor, rows: Rows, cos_BK: Tensor, values_BKJH: Tensor, mask_BKJ: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read the entries.

        Args:
            a: the layer's attention output, [B,T,H] or [n,H], in the layout `rows` (T may be a
                selection of positions).
            cos_BK: cosine of query and keys, float32 or float64.
            values_BKJH: J vectors per entry.
            mask_BKJ: bool, False where there is no entry or no token. A sequence without any entry
                reads zeros.

        Returns:
            (memory like a, or [B,1,H] for sentence_level; attention [B,A,T,K·J] or [B,1,1,K·J],
            before dropout).
        """
        values_BNH, mask_BN = values_BKJH.flatten(1, 2), mask_BKJ.flatten(1, 2)
        cos_BN = cos_BK.unsqueeze(-1).expand_as(mask_BKJ).flatten(1, 2)
        if self.kind == "sentence_level":
            probs_BN = _masked_softmax(cos_BN, mask_BN)
            memory_B1H = probs_BN.to(values_BNH.dtype).unsqueeze(1) @ values_BNH
            return memory_B1H, probs_BN[:, None, None, :]
        head_size = a.shape[-1] // self.heads
        query = (self.q_proj(a) * head_size**-0.5).unflatten(-1, (self.heads, -1))
        asking = rows.mask_BT.shape[1]
        # Applying k_proj and v_proj to the readers or to the entries costs, per sequence,
        # A·P·N·H or N·H² + P·N·H multiplications each.
        # A graph that is exported for any length must not depend on the length's size.
        fixed = torch.compiler.is_exporting()
        absorbs = not fixed and asking * (self.heads - 1) < a.shape[-1]
        if absorbs:
            query_BATh = rows.unpack(self.k_proj(query, absorb="query")).transpose(1, 2)
            keys_BANh = values_BNH.unsqueeze(1)
        else:
            query_BATh = rows.unpack(query).transpose(1, 2)
            keys_BANh = split_heads(self.k_proj(values_BNH), self.heads)
        wide = cos_BK.dtype
        scores_BATN = _product(query_BATh, keys_BANh.transpose(-1, -2)).to(wide)
        bias_BAN = self.beta.to(wide)[None, :, None] * cos_BN[:, None]
        probs_BATN = _masked_softmax(scores_BATN + bias_BAN[:, :, None], mask_BN[:, None, None])
        weights_BATN = self.dropout(probs_BATN).to(values_BNH.dtype)
        if absorbs:
            read_BATH = _product(weights_BATN, values_BNH.unsqueeze(1))
            read = self.v_proj(
                rows.pack(read_BATH.transpose(1, 2)),
                absorb="read",
                shares=rows.pack(weights_BATN.sum(-1).transpose(1, 2)),
            )
        else:
            read_BATd = _product(weights_BATN, split_heads(self.v_proj(values_BNH), self.heads))
            read = rows.pack(read_BATd.transpose(1, 2))
        # The published reshape starts from [B,A,T,d]; it is never packed.
        mixed = self.mixes_positions
        merged = read.transpose(1, 2).reshape(a.shape) if mixed else read.flatten(-2)
        # out_proj has a bias: where nothing was found nothing may be added.
        found_BT1 = mask_BN.any(-1)[:, None, None].expand(-1, asking, -1)
        return self.out_proj(merged) * rows.pack(found_BT1), probs_BATN


def split_heads(x_BTH: Tensor, heads: int) -> Tensor:
    """[B,T,A·d] -> [B,A,T,d]."""
    split: Tensor = x_BTH.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(x_BATd: Tensor) -> Tensor:
    """[B,A,T,d] -> [B,T,A·d]."""
    return x_BATd.transpose(1, 2).flatten(-2)


def _product(left_BATx: Tensor, right_BAxy: Tensor) -> Tensor:
    """Matrix product per head; a right side that all heads share is not copied for each."""
    if right_BAxy.shape[1] != 1:
        return left_BATx @ right_BAxy
    shared: Tensor = left_BATx.flatten(1, 2) @ right_BAxy.squeeze(1)
    heads, asking = left_BATx.shape[1:3]
    split: Tensor = shared.unflatten(1, (heads, asking))
    return split


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis; a row with nothing to attend to gives zeros, not NaN."""
    filled = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(filled, -1) * mask
