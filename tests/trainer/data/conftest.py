"""Small corpora on disk and vocabularies in memory for the tests of the data path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.vocab import VocabTables

PAD, UNK, CLS, SEP, MASK = range(5)
FIRST_WORD = 5


def write_part(
    path: Path,
    tokens_nt: np.ndarray,
    *,
    first_doc: int = 0,
    token_type: pa.DataType | None = None,
    batches: int = 1,
) -> None:
    """Write one part; row i is of document first_doc + i and covered by entry ordinals i, i+1."""
    rows, length = tokens_nt.shape
    flat = pa.array(tokens_nt.reshape(-1), type=token_type or pa.uint16())
    batch = pa.record_batch(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(flat, length),
            "doc_id": pa.array(np.arange(first_doc, first_doc + rows)),
            "first_entry": pa.array(np.arange(rows, dtype=np.int32)),
            "num_entries": pa.array(np.full(rows, 2, dtype=np.int32)),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)


def random_sequences(lengths: Sequence[int], width: int, vocab_size: int, seed: int) -> np.ndarray:
    """Sequences [CLS] words [SEP] padded to `width`; `lengths` count everything but padding."""
    draw = np.random.default_rng(seed)
    tokens = np.full((len(lengths), width), PAD, dtype=np.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = draw.integers(FIRST_WORD, vocab_size, length)
        tokens[row, 0], tokens[row, length - 1] = CLS, SEP
    return tokens


def make_vocab(
    size: int = 50, *, continuations: Sequence[int] = (), rarity: np.ndarray | None = None
) -> VocabTables:
    special = np.zeros(size, dtype=np.bool_)
    special[:FIRST_WORD] = True
    word_start = np.ones(size, dtype=np.bool_)
    word_start[list(continuations)] = False
    return VocabTables(
        pad_token_id=PAD,
        mask_token_id=MASK,
        special=special,
        word_start=word_start,
        rarity=np.zeros(size, dtype=np.float32) if rarity is None else rarity.astype(np.float32),
    )


@pytest.fixture(scope="session")
def part_writer() -> Callable[..., None]:
    return write_part


@pytest.fixture(scope="session")
def sequence_maker() -> Callable[..., np.ndarray]:
    return random_sequences


@pytest.fixture(scope="session")
def vocab_maker() -> Callable[..., VocabTables]:
    return make_vocab
