"""What masking must know of a vocabulary, as arrays indexed by token id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A token more frequent than this is taken for a stop word; small vocabularies, where every token
# is frequent, count as stop words only what is that many times more frequent than the average.
_STOP_FREQUENCY = 1e-3
_STOP_TIMES_AVERAGE = 8.0
_STOP_AT_MOST = 0.5
_MIN_COUNT = 2
_UNUSED = re.compile(r"^\[unused\d+\]$")


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabTables:
    """Per-token facts; V is the vocabulary's size.

    Attributes:
        pad_token_id: the padding token.
        mask_token_id: the token that hides a masked one.
        special: bool [V], tokens that are never masked and never drawn as a random replacement.
        word_start: bool [V], False for a piece that continues the word before it ("##ing").
        rarity: float32 [V] in [0, 1], weight of a token in salient masking.
    """

    pad_token_id: int
    mask_token_id: int
    special: NDArray[np.bool_]
    word_start: NDArray[np.bool_]
    rarity: NDArray[np.float32]

    def __post_init__(self) -> None:
        sizes = {len(self.special), len(self.word_start), len(self.rarity)}
        if len(sizes) != 1:
            raise ValueError(f"vocabulary tables must have one length, got {sorted(sizes)}")
        for name in ("pad_token_id", "mask_token_id"):
            token_id = getattr(self, name)
            if not 0 <= token_id < self.vocab_size or not self.special[token_id]:
                raise ValueError(
                    f"{name}={token_id} must be a special token in [0, {self.vocab_size})"
                )
        if self.special.all():
            raise ValueError("every token is special: nothing could be masked or drawn")
        if not np.isfinite(self.rarity).all() or (self.rarity < 0).any():
            raise ValueError("rarity must be finite and >= 0")

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return len(self.special)


def token_rarity(
    counts_V: NDArray[np.integer], countable_V: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Weigh tokens by how rare they are: -log frequency, scaled to [0, 1].

    0 from the frequency of stop words upwards, 1 at the lowest count that is kept; tokens seen
    fewer than twice weigh 0, because a model cannot learn to tell them and most are noise.

    Args:
        counts_V: occurrences in the training text, int [V].
        countable_V: bool [V], tokens that may have a weight at all; frequencies are among them.

    Returns:
        float32 [V].
    """
    counts = np.where(countable_V, counts_V, 0).astype(np.float64)
    total = counts.sum()
    kept = counts >= _MIN_COUNT
    weights = np.zeros(len(counts), dtype=np.float32)
    if not kept.any():
        return weights
    average = 1.0 / int(np.count_nonzero(countable_V))
    stop = min(_STOP_AT_MOST, max(_STOP_FREQUENCY, _STOP_TIMES_AVERAGE * average))
    highest, lowest = np.log(stop), np.log(counts[kept].min() / total)
    if lowest >= highest:
        return weights
    scaled = (highest - np.log(counts[kept] / total)) / (highest - lowest)
    weights[kept] = np.clip(scaled, 0.0, 1.0)
    return weights


def vocab_tables(tokenizer: Any, token_counts_V: NDArray[np.integer]) -> VocabTables:
    """Build the tables of a WordPiece tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer whose continuation pieces begin with "##".
        token_counts_V: int [V], occurrences of each token in the training sequences.

    Raises:
        ValueError: the tokenizer has no mask or no pad token, or the counts are not its own.
    """
    size = len(tokenizer)
    counts = np.asarray(token_counts_V)
    if counts.shape != (size,) or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(
            f"token counts have shape {list(counts.shape)} and dtype {counts.dtype}, but the "
            f"tokenizer has {size} tokens: they must be integers [{size}], of a corpus built with "
            "this tokenizer"
        )
    if (counts < 0).any():
        raise ValueError("token counts must be >= 0; the file is damaged, build the corpus again")
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"the tokenizer has no {name}; masked-language modelling needs one")
    tokens: list[str] = [
        token or "" for token in tokenizer.convert_ids_to_tokens(list(range(size)))
    ]
    special = np.array([_UNUSED.match(token) is not None for token in tokens], dtype=np.bool_)
    special[list(tokenizer.all_special_ids)] = True
    word_start = np.array([not token.startswith("##") for token in tokens], dtype=np.bool_)
    has_text = np.array([any(c.isalnum() for c in token) for token in tokens], dtype=np.bool_)
    return VocabTables(
        pad_token_id=int(tokenizer.pad_token_id),
        mask_token_id=int(tokenizer.mask_token_id),
        special=special,
        word_start=word_start,
        rarity=token_rarity(counts, has_text & ~special),
    )
