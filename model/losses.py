"""The retrieval warm-up loss: a masked sequence's query against its own document's key."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.retrieval import LayerRetrieval


def retrieval_loss(
    retrieval: LayerRetrieval,
    positive_BQ: Tensor,
    positive_ids_B: Tensor,
    doc_ids_B: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Contrastive cross-entropy in the spirit of REALM's inverse cloze task (arXiv 2002.08909).

    Each query must find the key of an entry of its own document among those of the sequences given
    here, which are one rank's micro-batch: keys of other ranks and passes are no negatives, so the
    number of trainers and the micro-batch's size change the objective a little, and a sequence
    alone has a loss of 0.
    Scores are the inner products by which the memory searches, over sqrt(Q). The retrieved entries
    are left out on purpose: as negatives from the first step they were measured to freeze the
    retriever at the first feature that it finds (right entry in the top-5: 0.1 instead of 1.0 on
    the synthetic world).

    Args:
        retrieval: a memory layer's report.
        positive_BQ: fresh keys of the right entries, with gradient.
        positive_ids_B: int64 ids of those entries; -1 where a sequence has none (it is left out).
        doc_ids_B: int64 document of each sequence.
        temperature: what the scores are divided by.

    Returns:
        Scalar, the mean over sequences that have a right entry; 0 (with gradient) if none has.
    """
    wide = torch.promote_types(retrieval.query_BQ.dtype, torch.float32)
    query_BQ = retrieval.query_BQ.to(wide)
    scale = query_BQ.shape[-1] ** -0.5 / temperature
    device = query_BQ.device
    positive_ids_B, doc_ids_B = positive_ids_B.to(device), doc_ids_B.to(device)
    has_B = positive_ids_B >= 0
    in_batch_BB = query_BQ @ positive_BQ.to(wide).T * scale
    # Another sequence's right entry is no negative if it comes from this sequence's document.
    diagonal_BB = torch.eye(len(has_B), dtype=torch.bool, device=device)
    same_BB = (doc_ids_B[:, None] == doc_ids_B[None]) & ~diagonal_BB
    in_batch_BB = in_batch_BB.masked_fill(same_BB | ~has_B[None] & ~diagonal_BB, float("-inf"))
    targets_B = torch.arange(len(has_B), device=device)
    losses_B = F.cross_entropy(in_batch_BB, targets_B, reduction="none")
    weights_B = has_B.to(wide)
    return (losses_B * weights_B).sum() / weights_B.sum().clamp(min=1.0)
