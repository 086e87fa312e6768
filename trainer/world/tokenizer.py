"""The synthetic world's tokenizer: BERT's special tokens and one token for every word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.corpus.wordpiece import SPECIAL_TOKENS
from trainer.world.facts import Fact
from trainer.world.words import GIVERS, RECEIVERS, THINGS, VERBS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = (*SPECIAL_TOKENS, *GIVERS, *VERBS, *RECEIVERS, *THINGS)
TOKEN_IDS = {token: number for number, token in enumerate(VOCABULARY)}
PAD, CLS, SEP, MASK = (TOKEN_IDS[token] for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
ENTRY_TOKENS = 5
"""[CLS] and a fact's four words."""
SEQUENCE_TOKENS = 6
"""[CLS], a question's four words and [SEP]."""


def world_tokenizer() -> PreTrainedTokenizerBase:
    """Make the tokenizer; the same one every time."""
    tokenizer = Tokenizer(models.WordPiece(vocab=TOKEN_IDS, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    from transformers import BertTokenizer

    return BertTokenizer(tokenizer_object=tokenizer)


def save_world_tokenizer(path: Path) -> str:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained` loads it.

    Returns:
        The fingerprint of what was written, as the memory's store wants it.
    """
    world_tokenizer().save_pretrained(path)
    return tokenizer_fingerprint(load_tokenizer(path))


def entry_tokens(facts: Sequence[Fact]) -> NDArray[np.int64]:
    """The facts as entries of the memory: int64 [N, ENTRY_TOKENS], [CLS] and the four words."""
    rows = [[CLS, *(TOKEN_IDS[word] for word in fact.words)] for fact in facts]
    return np.array(rows, dtype=np.int64).reshape(len(rows), ENTRY_TOKENS)


def question_tokens(entries_NS: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Questions for the things of entries.

    Args:
        entries_NS: as `entry_tokens` makes them.

    Returns:
        (input_ids int64 [N, SEQUENCE_TOKENS] whose last word is [MASK]; labels of the same shape,
        -100 everywhere but there).
    """
    rows = len(entries_NS)
    input_ids = np.concatenate([entries_NS, np.full((rows, 1), SEP, dtype=np.int64)], axis=1)
    labels = np.full_like(input_ids, -100)
    labels[:, ENTRY_TOKENS - 1] = input_ids[:, ENTRY_TOKENS - 1]
    input_ids[:, ENTRY_TOKENS - 1] = MASK
    return input_ids, labels
