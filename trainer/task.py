"""What a run trains on: a stream of masked batches, and the memory content that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from memory_server.store.store import Store
from trainer.corpus.info import load_corpus_info
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.data.masking import MaskingSettings
from trainer.data.positives import PositiveEntries
from trainer.data.sequences import SequenceDataset
from trainer.data.stream import BatchStream, TrainBatch
from trainer.data.vocab import VocabTables, vocab_tables
from trainer.evaluate import heldout_batches
from trainer.settings import TrainSettings


class Stream(Iterator[list[TrainBatch]], Protocol):
    """An endless iterator over a rank's optimizer steps; `BatchStream` is one."""

    @property
    def cursor(self) -> Cursor:
        """The place behind the steps handed out so far."""

    def close(self) -> None:
        """Free threads and files."""


class Task(Protocol):
    """Picklable; every rank opens its own stream."""

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor
    ) -> Stream:
        """Open the stream of a rank at a cursor."""

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        """Batches that were never trained on, the same ones every time."""

    def content_version(self, step: int) -> str | None:
        """The memory content that a refresh at this step brings along; None: as it is."""


@dataclass(frozen=True)
class CorpusTask:
    """Masked-LM pre-training on a corpus made by `pluglm corpus build`.

    Args:
        corpus: the corpus directory.
        store: the memory's store, whose entries of the same documents are the positives.
        version: content version of the store that the run began with; None: the store's head.
            A run that is resumed must be given the checkpoint's, because the store may have moved
            on while the memory serves what it served.
    """

    corpus: Path
    store: Path
    version: str | None = None

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor
    ) -> Stream:
        """See `Task.open`."""
        info = load_corpus_info(self.corpus)
        data = settings.data
        return BatchStream(
            SequenceDataset(info.sequences_path),
            PositiveEntries(Store.open(self.store), self.version),
            MaskingSettings(
                vocab=corpus_vocab(self.corpus),
                mask_probability=data.mask_probability,
                whole_word=data.whole_word_mask,
                salient=data.salient_mask,
            ),
            seed=settings.run.seed,
            batch_size=settings.optim.batch_size,
            micro_batch_size=settings.micro_batch_size,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        """See `Task.heldout`: documents that the corpus kept out of its sequences."""
        info = load_corpus_info(self.corpus)
        return heldout_batches(
            SequenceDataset(info.heldout_path),
            PositiveEntries(Store.open(self.store), self.version),
            MaskingSettings(
                vocab=corpus_vocab(self.corpus),
                mask_probability=settings.evaluate.mask_probability,
                whole_word=settings.data.whole_word_mask,
                salient=settings.data.salient_mask,
            ),
            sequences=settings.evaluate.sequences,
            rank=rank,
            world_size=world_size,
        )

    def content_version(self, step: int) -> str | None:
        """A corpus's memory does not change while it trains."""
        return None


def corpus_vocab(corpus: Path) -> VocabTables:
    """The masking tables of a corpus's tokenizer and token counts."""
    info = load_corpus_info(corpus)
    return vocab_tables(load_tokenizer(info.tokenizer_path), np.load(info.token_counts_path))
