"""The replies of several shards as one that looks like a shard's: for relays, and cheap to send."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memory_server.merge import merge_order
from memory_server.replies import ShardReply


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
    scores_GBk = torch.from_numpy(np.stack([reply.scores for reply in replies]))
    ids_GBk = torch.from_numpy(np.stack([reply.ids for reply in replies]))
    order_Bk = merge_order(scores_GBk, ids_GBk, k).numpy()
    from_shard_Bk, from_hit_Bk = np.divmod(order_Bk, replies[0].ids.shape[1])
    dtype = np.result_type(*[reply.tokens.dtype for reply in replies])
    tokens_BkS = np.empty((*order_Bk.shape, replies[0].tokens.shape[2]), dtype=dtype)
    for shard, reply in enumerate(replies):
        rows, places = np.nonzero(from_shard_Bk == shard)
        tokens_BkS[rows, places] = reply.tokens[rows, from_hit_Bk[rows, places]]
    return ShardReply(
        shard=replies[0].shard,
        ids=_winners([reply.ids for reply in replies], order_Bk),
        scores=_winners([reply.scores for reply in replies], order_Bk),
        doc_ids=_winners([reply.doc_ids for reply in replies], order_Bk),
        tokens=tokens_BkS,
        epoch=epoch,
        encoder_step=encoder_step,
        exact=all(reply.exact for reply in replies),
    )


def _winners(
    hits_GBK: Sequence[npt.NDArray[Any]], order_Bk: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    winners: npt.NDArray[Any] = np.take_along_axis(
        np.concatenate(hits_GBK, axis=1), order_Bk, axis=1
    )
    return winners
