"""A shard's reply, as it travels, and the one answer that the replies of all shards make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memory_server.api import Retrieved
from memory_server.index.merge import best_hits


@dataclass(frozen=True, kw_only=True)
class ShardReply:
    """The k best entries of one shard: ids, doc_ids int64 [B, k], scores float32 [B, k].

    `tokens` [B, k, S] keeps the stored integer type, so that it is small on the wire.
    """

    shard: int
    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    doc_ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    epoch: int
    encoder_step: int
    exact: bool = True


def merge_replies(
    replies: Sequence[ShardReply],
    k: int,
    *,
    device: torch.device,
    missing_shards: tuple[int, ...] = (),
) -> Retrieved:
    """The answer that the replies of one epoch make; see `combine_replies`."""
    return as_retrieved(combine_replies(replies, k), device=device, missing_shards=missing_shards)


def combine_replies(replies: Sequence[ShardReply], k: int) -> ShardReply:
    """The k best of all; ties have the lower id first, so that it does not matter who combines.

    Only the winners' tokens are touched, and keep their stored type.

    Raises:
        ValueError: there is no reply, or the replies are of different epochs.
    """
    epochs = {(reply.epoch, reply.encoder_step) for reply in replies}
    if len(epochs) != 1:
        raise ValueError(f"replies must be of one epoch, these are of {sorted(epochs)}")
    if len(replies) == 1:
        return replies[0]
    epoch, encoder_step = epochs.pop()
    ids_BM, scores_BM, doc_ids_BM, tokens_BMS = (
        np.concatenate([getattr(reply, name) for reply in replies], axis=1)
        for name in ("ids", "scores", "doc_ids", "tokens")
    )
    at_Bk = best_hits(scores_BM, ids_BM, k)
    return ShardReply(
        shard=replies[0].shard,
        ids=ids_BM.take(at_Bk),
        scores=scores_BM.take(at_Bk),
        doc_ids=doc_ids_BM.take(at_Bk),
        tokens=tokens_BMS.reshape(-1, tokens_BMS.shape[2]).take(at_Bk, axis=0),
        epoch=epoch,
        encoder_step=encoder_step,
        exact=all(reply.exact for reply in replies),
    )


def as_retrieved(
    reply: ShardReply, *, device: torch.device, missing_shards: tuple[int, ...]
) -> Retrieved:
    """The one reply as an answer; its tensors are its own, while a reply may be a view."""
    ids, scores, doc_ids = (
        array if array.flags.owndata else array.copy()
        for array in (reply.ids, reply.scores, reply.doc_ids)
    )
    return Retrieved(
        ids=torch.from_numpy(ids).to(device),
        scores=torch.from_numpy(scores).to(device),
        tokens=torch.from_numpy(reply.tokens.astype(np.int64)).to(device),
        doc_ids=torch.from_numpy(doc_ids).to(device),
        epoch=reply.epoch,
        encoder_step=reply.encoder_step,
        missing_shards=missing_shards,
        exact=reply.exact,
    )
