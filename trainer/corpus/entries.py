"""A document's entries: the one place that says how text is cut for a memory.

A build cuts whole corpora with it, an edit of a memory the few documents that it is given; both
come to the same entries. Imports neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from trainer.corpus.cutting import Spans, cut
from trainer.corpus.settings import CLS_TOKENS

TITLE_SHARE = 4  # a title takes at most a quarter of its entry


@dataclass(frozen=True, kw_only=True)
class CutDocument:
    """A document's entries in order.

    Attributes:
        spans: int64 [n, 2], start and end (exclusive) of each entry among the document's tokens.
        tokens: n rows, int64 [S]: [CLS], the title where it is wanted, the span, padding.
        texts: n pieces of the document's text.
    """

    spans: Spans
    tokens: list[NDArray[np.int64]]
    texts: list[str]


def entry_prefix(cls: int, title: Encoding | None, entry_tokens: int) -> list[int]:
    """What every entry of a document begins with: [CLS], and a title's first tokens."""
    room = (entry_tokens - CLS_TOKENS) // TITLE_SHARE
    return [cls, *(title.ids[:room] if title is not None else ())]


def cut_entries(
    encoding: Encoding, text: str, *, prefix: Sequence[int], entry_tokens: int, pad: int
) -> CutDocument:
    """Cut a document into entries of at most S = `entry_tokens` tokens.

    Args:
        encoding: of `text`, without special tokens; may be empty, which gives no entry.
        prefix: see `entry_prefix`.
        pad: fills each row up to S.
    """
    ids = np.array(encoding.ids, dtype=np.int64)
    spans = cut(begins_word(encoding), entry_tokens - len(prefix))
    offsets = encoding.offsets if len(spans) else []
    return CutDocument(
        spans=spans,
        tokens=[padded_row(entry_tokens, pad, prefix, ids[start:end]) for start, end in spans],
        texts=[text[offsets[start][0] : offsets[end - 1][1]] for start, end in spans],
    )


def begins_word(encoding: Encoding) -> NDArray[np.bool_]:
    """[n], False where a token has the same word as the one before it."""
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    begins = np.ones(len(words), dtype=np.bool_)
    begins[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    return begins


def padded_row(
    length: int, pad: int, prefix: Sequence[int], ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [length]: the prefix, the ids, and padding."""
    row = np.full(length, pad, dtype=np.int64)
    row[: len(prefix)] = prefix
    row[len(prefix) : len(prefix) + len(ids)] = ids
    return row
