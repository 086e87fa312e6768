"""The two kinds of encoder layer: plain, and reading the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import CopyLinear, KnowledgeAttention, SelfAttention
from model.config import PlugLMConfig
from model.embeddings import Embeddings
from model.entry_encoder import EntryEncoder
from model.pooling import AttentivePooler
from model.query_norm import make_query_norm
from model.retrieval import LayerRetrieval, Lookup

COSINE_EPS = 1e-8


class FeedForward(nn.Module):
    """Linear, erf GELU, linear, dropout."""

    def __init__(self, config: PlugLMConfig, width: int) -> None:
        super().__init__()
        self.dense_in = nn.Linear(config.hidden_size, width)
        self.dense_out = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.dense_out(F.gelu(self.dense_in(x))))
        return out


class PlainLayer(nn.Module):
    """A post-LayerNorm BERT layer."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.ffn = FeedForward(config, config.intermediate_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """[B,T,H], bool [B,T] -> [B,T,H]."""
        a_BTH = self.attention(x_BTH, mask_BT)
        out: Tensor = self.LayerNorm(a_BTH + self.ffn(a_BTH))
        return out


class MemoryLayer(nn.Module):
    """`x' = LN(a + FFN_small(a) + memory)`, with one retrieval per sequence."""

    def __init__(self, config: PlugLMConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention = SelfAttention(config)
        self.pooler = AttentivePooler(config.hidden_size)
        self.query_proj = CopyLinear(config.hidden_size, config.key_size)
        self.query_norm = make_query_norm(config.query_norm, config.key_size)
        self.knowledge_attention = KnowledgeAttention(config)
        if config.memory_ffn_size:
            self.ffn = FeedForward(config, config.memory_ffn_size)
        self.has_ffn = config.memory_ffn_size > 0
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BTH: Tensor,
        mask_BT: Tensor,
        *,
        entry_encoder: EntryEncoder,
        embeddings: Embeddings,
        lookup: Lookup | None,
        positions_BP: Tensor | None = None,
        output_attention: bool = False,
    ) -> tuple[Tensor, LayerRetrieval | None]:
        """Run the layer.

        Args:
            x_BTH: input; mask_BT: bool, True for tokens.
            entry_encoder: encodes the K retrieved entries again with the current weights.
            embeddings: the model's embeddings, shared with the input.
            lookup: the memory; None leaves the memory term out.
            positions_BP: int64, the only positions whose output is wanted (last layer, masked LM).
            output_attention: report the knowledge attention per entry.

        Returns:
            ([B,T,H] or [B,P,H], what was retrieved).
        """
        a_BTH = self.attention(x_BTH, mask_BT)
        query_BQ = None
        if lookup is not None:
            query_BQ = self.query_norm(self.query_proj(self.pooler(a_BTH, mask_BT)))
        select_late = self.knowledge_attention.mixes_positions
        if positions_BP is not None and not select_late:
            # From here on every position stands alone, so the unwanted ones need no computation.
            a_BTH = select_positions(a_BTH, positions_BP)
        out_BTH = a_BTH + self.ffn(a_BTH) if self.has_ffn else a_BTH
        retrieval = None
        if lookup is not None and query_BQ is not None:
            memory, retrieval = self._read(
                a_BTH, query_BQ, lookup, entry_encoder, embeddings, output_attention
            )
            out_BTH = out_BTH + memory
        if positions_BP is not None and select_late:
            out_BTH = select_positions(out_BTH, positions_BP)
        normed: Tensor = self.LayerNorm(out_BTH)
        return normed, retrieval

    def _read(
        self,
        a_BTH: Tensor,
        query_BQ: Tensor,
        lookup: Lookup,
        entry_encoder: EntryEncoder,
        embeddings: Embeddings,
        output_attention: bool,
    ) -> tuple[Tensor, LayerRetrieval]:
        retrieved = lookup(query_BQ.detach().float())
        tokens_BKS = retrieved.tokens.to(a_BTH.device)
        found_BK = (retrieved.ids >= 0).to(a_BTH.device)
        key_BKQ, values_BKJH, mask_BKJ = entry_encoder(tokens_BKS, embeddings)
        wide = torch.promote_types(query_BQ.dtype, torch.float32)
        cos_BK = F.cosine_similarity(
            query_BQ.to(wide).unsqueeze(1), key_BKQ.to(wide), dim=-1, eps=COSINE_EPS
        )
        memory, probs = self.knowledge_attention(
            a_BTH, cos_BK, values_BKJH, mask_BKJ & found_BK.unsqueeze(-1)
        )
        attention = None
        if output_attention:
            attention = probs.detach().unflatten(-1, tuple(mask_BKJ.shape[1:])).sum(-1)
        report = LayerRetrieval(
            layer=self.index,
            query_BQ=query_BQ,
            key_BKQ=key_BKQ,
            retrieved=retrieved,
            attention_BATK=attention,
        )
        return memory, report


def select_positions(x_BTH: Tensor, positions_BP: Tensor) -> Tensor:
    """[B,T,H], int64 [B,P] -> [B,P,H]."""
    return x_BTH.gather(1, positions_BP.unsqueeze(-1).expand(-1, -1, x_BTH.shape[-1]))
