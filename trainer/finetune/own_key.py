"""A loss for retrieval while a model is fine-tuned: a row's query finds the key of its own text,
of the entry that the task's data say answers it, or of samples of its label.

A task's loss alone does not keep the queries of different texts apart: the gradient reaches them
only through the attention to what was read, and after some epochs all rows can read the same few
entries (docs/experiments.md). Pre-training's contrastive loss is carried on with the task's rows,
each of which is its own right entry. Where the data name a passage for each row (as those of
DPR do, arXiv 2004.04906), that is the right entry: a short text does not show by itself what a
passage about it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses import retrieval_loss
from model.retrieval import LayerRetrieval


def as_entries(input_ids: Tensor, *, entry_tokens: int, separator: int | None, pad: int) -> Tensor:
    """Rows as a memory would hold them: [CLS] and the text's first tokens, int64 [B,S].

    Args:
        input_ids: int64 [B,T], padded on the right.
        entry_tokens: the longest that entries of the memory are.
        separator: the token that ends a text, which entries do not have; None: rows have none.
        pad: the pad token, which takes its place.
    """
    tokens_BS = input_ids[:, :entry_tokens]
    return tokens_BS if separator is None else tokens_BS.masked_fill(tokens_BS == separator, pad)


def own_key_loss(
    model: Any,
    retrievals: Sequence[LayerRetrieval],
    input_ids: Tensor,
    *,
    entry_tokens: int,
    separator: int | None,
    right_entries: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a row's right entry among those of its pass, mean over the memory layers.

    Rows of the same right entry are not each other's negatives. A pass of one row has a loss of 0.

    Args:
        model: the PlugLM that gave the reports, its keys with gradient.
        retrievals: of each memory layer.
        input_ids: int64 [B,T], the rows of the pass.
        entry_tokens, separator: as in `as_entries`.
        right_entries: int64 [B,S], each row's right entry; None: the row itself is.

    Returns:
        A scalar, with gradient for queries and keys.
    """
    pad = model.config.pad_token_id or 0
    tokens_BS = right_entries
    if tokens_BS is None:
        tokens_BS = as_entries(input_ids, entry_tokens=entry_tokens, separator=separator, pad=pad)
    texts_B = torch.unique(tokens_BS, dim=0, return_inverse=True)[1]
    own_BQ = model.base_model.entry_keys(tokens_BS)
    every_B = torch.arange(len(tokens_BS), device=input_ids.device)
    return torch.stack([retrieval_loss(r, own_BQ, every_B, texts_B) for r in retrievals]).mean()


def own_label_loss(
    model: Any,
    retrievals: Sequence[LayerRetrieval],
    samples_BS: Tensor,
    labels_B: Tensor,
    doc_ids_B: Tensor,
) -> Tensor:
    """Supervised contrast (arXiv 2004.11362): a row's query finds samples of the row's label.

    For each row the mean over the pass's samples of its label of their cross-entropy among all
    samples of the pass but those of its own document, which it may not read; then the mean over
    rows that have any, and over the memory layers. 0 where no row has one.

    Args:
        model: the PlugLM that gave the reports, its keys with gradient.
        retrievals: of each memory layer.
        samples_BS: int64 [B,S], the entry that the memory has of each row.
        labels_B: int64, of the rows.
        doc_ids_B: int64, the documents of their entries.

    Returns:
        A scalar, with gradient for queries and keys.
    """
    key_BQ = model.base_model.entry_keys(samples_BS)
    own_BB = doc_ids_B[:, None] == doc_ids_B[None]
    right_BB = (labels_B[:, None] == labels_B[None]) & ~own_BB
    count_B = right_BB.sum(1)
    losses = []
    for retrieval in retrievals:
        wide = torch.promote_types(retrieval.query_BQ.dtype, torch.float32)
        query_BQ = retrieval.query_BQ.to(wide)
        score_BB = query_BQ @ key_BQ.to(wide).T * query_BQ.shape[-1] ** -0.5
        # A finite fill: a row whose document is alone in the pass has no other score.
        log_BB = F.log_softmax(score_BB.masked_fill(own_BB, torch.finfo(wide).min), dim=1)
        of_B = -log_BB.masked_fill(~right_BB, 0.0).sum(1) / count_B.clamp(min=1)
        losses.append(of_B.sum() / (count_B > 0).sum().clamp(min=1))
    return torch.stack(losses).mean()
