"""The best answer over all windows of a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.finetune.heads import FloatArray

NO_CONTEXT = -1


@dataclass(frozen=True, kw_only=True)
class BestSpan:
    """Characters of the context, from `start` up to but without `end`."""

    start: int
    end: int
    score: float
    log_total: float
    """Logarithm of the sum of exp(score) over all spans that were allowed."""


def best_span(
    start_T: FloatArray,
    end_T: FloatArray,
    first_T: npt.NDArray[np.int32],
    behind_T: npt.NDArray[np.int32],
    longest: int,
) -> BestSpan:
    """The span of one window with the greatest sum of logits; of equals the first.

    Args:
        start_T: logits of the answer's first token.
        end_T: logits of its last.
        first_T: each token's first character in the context; -1 for tokens of no context.
        behind_T: the character behind its last.
        longest: most tokens of an answer.
    """
    (places,) = np.nonzero(first_T != NO_CONTEXT)
    scores = start_T[places, None].astype(np.float64) + end_T[None, places]
    tokens = places[None, :] - places[:, None]
    scores[(tokens < 0) | (tokens >= longest)] = -np.inf
    i, j = np.unravel_index(int(scores.argmax()), scores.shape)
    best = float(scores[i, j])
    return BestSpan(
        start=int(first_T[places[i]]),
        end=int(behind_T[places[j]]),
        score=best,
        log_total=best + float(np.log(np.exp(scores - best).sum())),
    )


def best_of(windows: list[BestSpan]) -> tuple[BestSpan, float]:
    """The best span of a context's windows, and its share among all spans of all of them."""
    best = max(windows, key=lambda span: span.score)
    totals: Any = np.array([span.log_total for span in windows])
    total = float(np.logaddexp.reduce(totals))
    return best, float(np.exp(best.score - total))
