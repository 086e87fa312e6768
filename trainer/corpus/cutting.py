"""Where a document is cut: spans of consecutive tokens, as pure functions.

Spans cover the document without overlap. None begins inside a word, unless the word alone is
longer than a whole span.
"""

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.int64]


def cut(begins_word: NDArray[np.bool_], capacity: int) -> Spans:
    """Cut n tokens into consecutive spans of at most `capacity`.

    Args:
        begins_word: [n], False where a token continues the word before it.
        capacity: tokens in a span, at least 1.

    Returns:
        int64 [spans, 2], start and end (exclusive) of each; empty for no tokens.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a span must have room for at least one token")
    size = len(begins_word)
    places = np.arange(size)
    word_starts = np.maximum.accumulate(np.where(begins_word, places, 0)) if size else places
    spans = []
    start = 0
    while start < size:
        end = min(start + capacity, size)
        if end < size and word_starts[end] > start:
            end = int(word_starts[end])
        spans.append((start, end))
        start = end
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def drop_short_tail(spans: Spans, minimum: int) -> Spans:
    """The spans without the last one, if that has fewer than `minimum` tokens."""
    if len(spans) and spans[-1, 1] - spans[-1, 0] < minimum:
        return spans[:-1]
    return spans


def covering(spans: Spans, entries: Spans) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which entries hold the tokens of each span.

    Args:
        spans, entries: cuts of the same document; the entries reach at least as far.

    Returns:
        (first, count), int64 [spans]: ordinals of entries, which are consecutive.
    """
    first = np.searchsorted(entries[:, 1], spans[:, 0], side="right")
    last = np.searchsorted(entries[:, 0], spans[:, 1] - 1, side="right") - 1
    return first, last - first + 1
