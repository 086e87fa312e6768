"""What a run trains on: a stream of masked batches, and the memory content that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from memory_server.store.store import Store
from trainer.corpus.info import CorpusInfo, load_corpus_info
from trainer.corpus.remote import local_corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.data.joined import JoinedSequences
from trainer.data.masking import MaskingSettings
from trainer.data.order import order_of
from trainer.data.part_cache import PartCache
from trainer.data.pieces import Phases
from trainer.data.positives import PositiveEntries
from trainer.data.sequences import SequenceDataset
from trainer.data.stream import BatchStream, Cutting, TrainBatch
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
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor, step: int = 0
    ) -> Stream:
        """Open the stream of a rank at a cursor, after so many optimizer steps."""

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        """Batches that were never trained on, the same ones every time."""

    def content_version(self, step: int) -> str | None:
        """The memory content that a refresh at this step brings along; None: as it is."""


@dataclass(frozen=True)
class CorpusTask:
    """Masked-LM pre-training on corpora made by `pluglm corpus build`.

    Args:
        corpus: the corpus directory, or its URL; `data.more_corpora` come beside it.
        store: the memory's store, whose entries of the same documents are the positives.
        version: content version of the store that the run began with; None: the store's head.
            A run that is resumed must be given the checkpoint's, because the store may have moved
            on while the memory serves what it served.
        domains: of the store, whose entries alone are positives; none named: all that are plugged.
    """

    corpus: Path | str
    store: Path | str
    version: str | None = None
    domains: tuple[str, ...] = ()

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor, step: int = 0
    ) -> Stream:
        """See `Task.open`."""
        data = settings.data
        infos = self._infos(settings)
        datasets = [
            SequenceDataset(info.sequences_path, cache_gib=data.cache_gib) for info in infos
        ]
        return BatchStream(
            JoinedSequences(datasets, pad_token_id=infos[0].pad_token_id),
            PositiveEntries(Store.open(self.store), self.version, domains=self.domains),
            MaskingSettings(
                vocab=corpora_vocab(infos),
                mask_probability=data.mask_probability,
                whole_word=data.whole_word_mask,
                salient=data.salient_mask,
            ),
            seed=settings.run.seed,
            cutting=Cutting(
                batch_size=settings.optim.batch_size,
                micro_batch_size=settings.micro_batch_size,
                batch_tokens=settings.optim.batch_tokens,
                length_buckets=data.length_buckets,
                by_file=data.shuffle_files > 0,
                phases=Phases(data.phase_lengths or (0,), data.phase_steps),
            ),
            rank=rank,
            world_size=world_size,
            cursor=cursor,
            step=step,
            order=order_of(
                [dataset.rows for dataset in datasets],
                weights=data.weights,
                files=data.shuffle_files,
                seed=settings.run.seed,
            ),
        )

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        """See `Task.heldout`: documents that the corpora kept out of their sequences."""
        infos = self._infos(settings)
        heldout = [SequenceDataset(i.heldout_path) for i in infos if i.heldout_sequences]
        return heldout_batches(
            JoinedSequences(heldout, pad_token_id=infos[0].pad_token_id),
            PositiveEntries(Store.open(self.store), self.version, domains=self.domains),
            MaskingSettings(
                vocab=corpora_vocab(infos),
                mask_probability=settings.evaluate.mask_probability,
                whole_word=settings.data.whole_word_mask,
                salient=settings.data.salient_mask,
            ),
            sequences=settings.evaluate.sequences,
            rank=rank,
            world_size=world_size,
        )

    def _infos(self, settings: TrainSettings) -> list[CorpusInfo]:
        cache = PartCache.of_this_machine(settings.data.cache_gib)
        corpora = (self.corpus, *settings.data.more_corpora)
        return [load_corpus_info(local_corpus(corpus, cache)) for corpus in corpora]

    def content_version(self, step: int) -> str | None:
        """A corpus's memory does not change while it trains."""
        return None


def corpus_vocab(corpus: Path | str) -> VocabTables:
    """The masking tables of a corpus's tokenizer and token counts."""
    return corpora_vocab([load_corpus_info(local_corpus(corpus))])


def corpora_vocab(infos: Sequence[CorpusInfo]) -> VocabTables:
    """The same of corpora of one tokenizer, their counts taken together."""
    counts = np.sum([np.load(info.token_counts_path) for info in infos], axis=0)
    return vocab_tables(load_tokenizer(infos[0].tokenizer_path), counts)
