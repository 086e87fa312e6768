"""Train a WordPiece tokenizer on a corpus (`train:SIZE`), the same one every time.

The `tokenizers` trainer numbers the pieces of one character in the order of a hash table, which
differs from run to run and then decides ties between merges. So the alphabet is chosen here, and
handed over as tokens with given numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trainer.corpus.documents import Document
from trainer.corpus.errors import CorpusError
from trainer.corpus.split import document_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "train:"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST, LARGEST = 256, 1 << 20
CONTINUES = "##"
MAX_TRAINING_CHARACTERS = 1_000_000_000
"""The trainer holds every distinct word, so a larger corpus is sampled, document by document."""
MAX_ALPHABET, MIN_ALPHABET = 1000, 64
UNICODE_SIZE = 0x110000


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over a corpus found: documents, characters, and how often each occurs."""

    documents: int
    characters: int
    counts: NDArray[np.int64]


def wanted_size(tokenizer: str) -> int | None:
    """The vocabulary size in "train:SIZE", or None when a tokenizer is to be loaded.

    Raises:
        CorpusError: SIZE is no whole number in the allowed range.
    """
    if not tokenizer.startswith(PREFIX):
        return None
    digits = tokenizer.removeprefix(PREFIX)
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not SMALLEST <= size <= LARGEST:
        raise CorpusError(
            f"the tokenizer {tokenizer!r} is not understood; train:SIZE takes a vocabulary size "
            f"from {SMALLEST} to {LARGEST}, for example train:8192"
        )
    return size


def survey(documents: Iterator[Document], seen: Callable[[int], None]) -> Survey:
    """Count documents and characters. `seen` is told the documents so far, now and then."""
    counts = np.zeros(UNICODE_SIZE, dtype=np.int64)
    number = characters = held = 0
    texts: list[str] = []
    for document in documents:
        number += 1
        held += len(document.text)
        texts.append(document.text)
        if held >= UNICODE_SIZE:
            characters += _count(texts, counts)
            texts, held = [], 0
            seen(number)
    characters += _count(texts, counts)
    seen(number)
    return Survey(documents=number, characters=characters, counts=counts)


def _count(texts: list[str], counts: NDArray[np.int64]) -> int:
    points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    counts += np.bincount(points, minlength=UNICODE_SIZE)
    return len(points)


def train_wordpiece(
    documents: Iterator[Document], found: Survey, size: int, seen: Callable[[int], None]
) -> "PreTrainedTokenizerBase":
    """Train an uncased BERT tokenizer.

    Args:
        documents: the documents that `found` surveyed, from the first.
        size: the largest vocabulary; a small corpus may give a smaller one.

    Returns:
        A `transformers` tokenizer. The same documents and size give the same one.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    limit = min(MAX_ALPHABET, max(MIN_ALPHABET, size // 16))
    alphabet = _alphabet(found.counts, normalizer, limit)
    pieces = [CONTINUES + letter for letter in alphabet if _may_continue(letter, splitter)]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizer
    learner.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learner.train_from_iterator(_sample(documents, found.characters, seen), trainer=trainer)
    # Only now are the special tokens the true ones: the pieces were among them for their numbers.
    tokenizer = Tokenizer(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    from transformers import BertTokenizer

    return BertTokenizer(tokenizer_object=tokenizer)


def _sample(
    documents: Iterator[Document], characters: int, seen: Callable[[int], None]
) -> Iterator[str]:
    share = MAX_TRAINING_CHARACTERS / max(characters, 1)
    for number, document in enumerate(documents, start=1):
        if share >= 1 or document_share(document.text, salt=b"tokenizer") < share:
            yield document.text
        if number % 1000 == 0:
            seen(number)


def _alphabet(
    counts: NDArray[np.int64], normalizer: normalizers.Normalizer, limit: int
) -> list[str]:
    """The most frequent characters after normalisation, in order. Ties: the lower code point."""
    totals: dict[str, int] = {}
    for point in np.flatnonzero(counts):
        for letter in normalizer.normalize_str(chr(point)):
            if not letter.isspace():
                totals[letter] = totals.get(letter, 0) + int(counts[point])
    return sorted(sorted(totals, key=lambda letter: (-totals[letter], letter))[:limit])


def _may_continue(letter: str, splitter: pre_tokenizers.PreTokenizer) -> bool:
    """Whether a word can go on with this character; punctuation stands alone."""
    return len(splitter.pre_tokenize_str("x" + letter)) == 1
