"""How far keys move from one refresh to the next, told from a sample of the entries read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from memory_server.api import Retrieved

SAMPLE = 256
NEAREST = 10

Encoder = Callable[[Mapping[str, Tensor]], Callable[[Tensor], Tensor]]


class KeyDrift:
    """A fixed sample of entries, and their keys under two sets of weights.

    The sample is the first entries that training reads: those whose keys matter.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Start without a sample; `encoder` makes a key encoder of published weights."""
        self._encoder = encoder
        self._tokens: dict[int, Tensor] = {}

    def note(self, found: Retrieved) -> None:
        """Look at a search's reply, until the sample is full."""
        if len(self._tokens) >= SAMPLE:
            return
        ids_N = found.ids.flatten().tolist()
        tokens_NS = found.tokens.flatten(0, 1).cpu()
        for place, entry_id in enumerate(ids_N):
            if entry_id >= 0 and entry_id not in self._tokens and len(self._tokens) < SAMPLE:
                self._tokens[entry_id] = tokens_NS[place]

    @torch.no_grad()
    def between(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of a refresh; none while the sample has fewer than two entries.

        Returns:
            `key_cosine`: mean cosine of the entries' old and new keys; `key_neighbours_kept`: of
            the nearest entries of each (by inner product, within the sample, itself left out) the
            share that is the same under both.
        """
        if len(self._tokens) < 2:
            return {}
        tokens_NS = torch.stack(list(self._tokens.values()))
        old_NQ, new_NQ = (self._encoder(weights)(tokens_NS).cpu() for weights in (old, new))
        nearest = min(NEAREST, len(tokens_NS) - 1)
        kept_N = [
            len(set(before) & set(after)) / nearest
            for before, after in zip(
                _nearest(old_NQ, nearest), _nearest(new_NQ, nearest), strict=True
            )
        ]
        return {
            "key_cosine": float(F.cosine_similarity(old_NQ, new_NQ, dim=-1).mean()),
            "key_neighbours_kept": sum(kept_N) / len(kept_N),
        }


def _nearest(keys_NQ: Tensor, count: int) -> list[list[int]]:
    scores_NN = keys_NQ @ keys_NQ.T
    scores_NN.fill_diagonal_(float("-inf"))
    found: list[list[int]] = scores_NN.topk(count, dim=1).indices.tolist()
    return found
