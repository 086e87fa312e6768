"""Each entry's share of what a sequence attends to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from model.retrieval import LayerRetrieval


@torch.no_grad()
def entry_shares(retrieval: LayerRetrieval) -> Tensor:
    """Each entry's share of a sequence's attention, [B,K]: the mean over heads and positions.

    Only for a pass with `output_attention`. A sequence of which no position asked gives zeros.
    """
    assert retrieval.attention_BATK is not None
    assert retrieval.asking_BT is not None
    over_heads_BTK = retrieval.attention_BATK.float().mean(1)
    if over_heads_BTK.shape[1] == 1 != retrieval.asking_BT.shape[1]:
        return over_heads_BTK.squeeze(1)  # one weighted sum for the whole sequence
    asking_BT = retrieval.asking_BT.float()
    weights_BT1 = (asking_BT / asking_BT.sum(1, keepdim=True).clamp(min=1.0)).unsqueeze(-1)
    return (over_heads_BTK * weights_BT1).sum(1)


def reads_of(retrievals: Iterable[LayerRetrieval]) -> list[tuple[Tensor, Tensor]]:
    """A pass's reads by layer: the entries' ids [B·K], -1 where there is none, and their shares.

    Nothing of the pass itself is held on to, and nothing waits for the device.
    """
    return [(r.retrieved.ids.flatten(), entry_shares(r).flatten()) for r in retrievals]
