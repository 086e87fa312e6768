"""Token embeddings, shared by the input and the memory's entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import PlugLMConfig
from model.rows import Rows


class TypeEmbedding(nn.Embedding):
    """Token types. With `memory_init="copy"` they start at zero: what all tokens share would make
    every entry as like a query as the right one."""


class Embeddings(nn.Module):
    """`Dropout(LN(W[ids] + P[position] + E[type]))`, positions from 0."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, hidden, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = TypeEmbedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, ids: Tensor, token_type_ids: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """Embed token ids.

        Args:
            ids: int64 [..., T], T at most `max_position_embeddings`.
            token_type_ids: int64, same shape; None means type 0 throughout, as entries use.
            rows: layout of ids [B,T]; None: every position is computed.

        Returns:
            [..., T, H], or [n, H] where `rows` packs.
        """
        length = ids.shape[-1]
        longest = self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(
                f"{length} tokens in a row, but the model has {longest} positions; shorten the "
                "text or build a model with a larger max_position_embeddings"
            )
        positions = torch.arange(length, device=ids.device)
        if rows is not None and rows.index_n is not None:
            ids = rows.pack(ids)
            positions = rows.index_n % length
            token_type_ids = None if token_type_ids is None else rows.pack(token_type_ids)
        if token_type_ids is None:
            # Asked as an embedding, not by indexing the weight, so that code which wraps modules
            # from outside (ZeRO-3 gathers a module's weights when it is called) sees the use.
            types = self.token_type_embeddings(positions.new_zeros(1))
        else:
            types = self.token_type_embeddings(token_type_ids)
        summed = self.word_embeddings(ids) + self.position_embeddings(positions) + types
        embedded: Tensor = self.dropout(self.LayerNorm(summed))
        return embedded
