"""How far keys move is told from the keys themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from memory_server.api import Retrieved
from trainer.drift import SAMPLE, KeyDrift


def encoder(weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tokens_NS: tokens_NS.float() @ weights["w"]


def found(ids: list[int]) -> Retrieved:
    """Entries [1,K] whose tokens are drawn by their ids."""
    rows = [
        torch.randint(1, 50, (6,), generator=torch.Generator().manual_seed(abs(i))) for i in ids
    ]
    return Retrieved(
        ids=torch.tensor([ids]),
        scores=torch.zeros(1, len(ids)),
        tokens=torch.stack(rows)[None],
        doc_ids=torch.tensor([ids]),
        epoch=1,
        encoder_step=0,
    )


def test_figures_are_those_of_the_keys() -> None:
    drift = KeyDrift(encoder)
    torch.manual_seed(0)
    old, new = {"w": torch.randn(6, 4)}, {"w": torch.randn(6, 4)}
    assert drift.between(old, new) == {}
    ids = list(range(30))
    drift.note(found(ids[:20]))
    drift.note(found([*ids[10:], -1]))
    told = drift.between(old, new)
    tokens = found(ids).tokens[0].float()
    a, b = tokens @ old["w"], tokens @ new["w"]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    assert told["key_cosine"] == pytest.approx(float(cosine), abs=1e-6)
    kept = []
    for row in range(30):
        others = [i for i in range(30) if i != row]
        best = [
            set(sorted(others, key=lambda i, k=keys, r=row: -float(k[r] @ k[i]))[:10])
            for keys in (a, b)
        ]
        kept.append(len(best[0] & best[1]) / 10)
    assert told["key_neighbours_kept"] == pytest.approx(sum(kept) / 30)
    assert 0 < told["key_neighbours_kept"] < 1


def test_keys_that_stay_have_not_moved() -> None:
    drift = KeyDrift(encoder)
    drift.note(found(list(range(20))))
    weights = {"w": torch.eye(6)}
    told = drift.between(weights, {"w": 3 * torch.eye(6)})
    assert told["key_cosine"] == pytest.approx(1.0)
    assert told["key_neighbours_kept"] == 1.0


def test_the_sample_is_bounded() -> None:
    drift = KeyDrift(encoder)
    for first in range(0, 3 * SAMPLE, 50):
        drift.note(found(list(range(first, first + 50))))
    assert len(drift._tokens) == SAMPLE
