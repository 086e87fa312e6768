"""A shard's reply, as it travels, and the one answer that the replies of all shards make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.api import Retrieved
from memory_server.merge import merge_order, side_by_side


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
    """Merge the replies of one epoch; ties have the lower id first, whatever the number of shards.

    Raises:
        ValueError: there is no reply, or the replies are of different epochs.
    """
    epochs = {(reply.epoch, reply.encoder_step) for reply in replies}
    if len(epochs) != 1:
        raise ValueError(f"replies must be of one epoch, these are of {sorted(epochs)}")
    epoch, encoder_step = epochs.pop()
    scores_GBk = _stacked([reply.scores for reply in replies])
    ids_GBk = _stacked([reply.ids for reply in replies])
    order_Bk = merge_order(scores_GBk, ids_GBk, k)
    tokens_BMS = side_by_side(_stacked([reply.tokens.astype(np.int64) for reply in replies]))
    wide_order = order_Bk.unsqueeze(2).expand(-1, -1, tokens_BMS.shape[2])
    doc_ids_GBk = _stacked([reply.doc_ids for reply in replies])
    return Retrieved(
        ids=side_by_side(ids_GBk).gather(1, order_Bk).to(device),
        scores=side_by_side(scores_GBk).gather(1, order_Bk).to(device),
        tokens=tokens_BMS.gather(1, wide_order).to(device),
        doc_ids=side_by_side(doc_ids_GBk).gather(1, order_Bk).to(device),
        epoch=epoch,
        encoder_step=encoder_step,
        missing_shards=missing_shards,
        exact=all(reply.exact for reply in replies),
    )


def _stacked(arrays: list[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
