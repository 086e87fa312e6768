"""One chunk of documents to Arrow parts: the work of a process of the pool.

Imports neither torch nor transformers, so that a process starts quickly and stays small.
"""

import os
import shutil
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from memory_server.store.segments import token_dtype
from trainer.corpus.cutting import Spans, covering, cut, drop_short_tail
from trainer.corpus.documents import Document
from trainer.corpus.entries import begins_word, cut_entries, entry_prefix, padded_row
from trainer.corpus.errors import CorpusError
from trainer.corpus.parts import sequence_columns, token_column, write_batch
from trainer.corpus.settings import EDGE_TOKENS, BuildSettings
from trainer.corpus.split import is_held_out

ENTRIES, TRAIN, HELDOUT = "entries", "sequences", "heldout"


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What encoding needs of the tokenizer; the fingerprint keeps a process's cache honest."""

    file: str
    fingerprint: str
    vocab_size: int
    pad: int
    cls: int
    sep: int


@dataclass(frozen=True, kw_only=True)
class ChunkTask:
    """Consecutive documents of one source. `first_doc_id` is that of the first one."""

    index: int
    base: int
    first_doc_id: int
    documents: tuple[Document, ...]
    settings: BuildSettings
    tokenizer: TokenizerFacts
    directory: str


@dataclass(frozen=True, kw_only=True)
class ChunkDone:
    """What a chunk's parts hold, as the journal keeps it."""

    index: int
    base: int
    documents: int
    heldout_documents: int
    empty_documents: int
    tokens: int
    entries: int
    sequences: int
    heldout: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass
class _Sequences:
    """Sequences gathered so far, for training or held out."""

    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    doc_ids: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    count: list[int] = field(default_factory=list)

    def write(self, path: Path, length: int, dtype: type[np.generic]) -> None:
        write_batch(
            path,
            sequence_columns(
                _stack(self.tokens, length, dtype),
                np.array(self.doc_ids, dtype=np.int64),
                np.array(self.first, dtype=np.int64),
                np.array(self.count, dtype=np.int64),
            ),
        )


@dataclass
class _Entries:
    """Entries gathered so far."""

    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    doc_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def write(self, path: Path, length: int, dtype: type[np.generic]) -> None:
        strings = {"text": self.texts, "title": self.titles, "source": self.sources}
        write_batch(
            path,
            {
                "doc_id": pa.array(self.doc_ids, type=pa.int64()),
                "tokens": token_column(_stack(self.tokens, length, dtype)),
                **{name: pa.array(rows, type=pa.large_string()) for name, rows in strings.items()},
            },
        )


def chunk_directory(parts: Path, index: int) -> Path:
    """Where a finished chunk's parts lie."""
    return parts / f"{index:08d}"


def encode_chunk(task: ChunkTask) -> ChunkDone:
    """Tokenise and cut a chunk and publish its parts under one directory by rename.

    Raises:
        CorpusError: a document cannot be tokenised; names it. OSError: the disk cannot be written.
    """
    settings, facts = task.settings, task.tokenizer
    entries, train, heldout = _Entries(), _Sequences(), _Sequences()
    tokens = empty = held_out = 0
    for ordinal, document in enumerate(task.documents):
        encoding = _encode(document.text, document, facts)
        held = is_held_out(document.text, settings.heldout_fraction)
        tokens += len(encoding)
        empty += len(encoding) == 0
        held_out += held
        doc_id = task.first_doc_id + ordinal
        _cut_document(encoding, document, doc_id, task, entries, heldout if held else train)
    done = ChunkDone(
        index=task.index,
        base=task.base,
        documents=len(task.documents),
        heldout_documents=held_out,
        empty_documents=empty,
        tokens=tokens,
        entries=len(entries.doc_ids),
        sequences=len(train.doc_ids),
        heldout=len(heldout.doc_ids),
    )
    dtype = token_dtype(facts.vocab_size)
    final = chunk_directory(Path(task.directory), task.index)
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
        temporary.mkdir()
        entries.write(temporary / f"{ENTRIES}.arrow", settings.entry_tokens, dtype)
        train.write(temporary / f"{TRAIN}.arrow", settings.sequence_length, dtype)
        heldout.write(temporary / f"{HELDOUT}.arrow", settings.sequence_length, dtype)
        if final.exists():
            shutil.rmtree(final)  # finished, but the build was killed before its journal said so
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return done


def _cut_document(
    encoding: Encoding,
    document: Document,
    doc_id: int,
    task: ChunkTask,
    entries: _Entries,
    sequences: _Sequences,
) -> None:
    settings, facts = task.settings, task.tokenizer
    if not len(encoding):
        return
    titled = settings.title_in_entry and document.title
    title = _encode(document.title, document, facts) if titled else None
    cut_document = cut_entries(
        encoding,
        document.text,
        prefix=entry_prefix(facts.cls, title, settings.entry_tokens),
        entry_tokens=settings.entry_tokens,
        pad=facts.pad,
    )
    entries.tokens += cut_document.tokens
    entries.texts += cut_document.texts
    entries.doc_ids += [doc_id] * len(cut_document.texts)
    entries.titles += [document.title] * len(cut_document.texts)
    entries.sources += [document.source] * len(cut_document.texts)
    _cut_sequences(encoding, cut_document.spans, doc_id, task, sequences)


def _cut_sequences(
    encoding: Encoding,
    entry_spans: Spans,
    doc_id: int,
    task: ChunkTask,
    sequences: _Sequences,
) -> None:
    settings, facts = task.settings, task.tokenizer
    ids = np.array(encoding.ids, dtype=np.int64)
    spans = cut(begins_word(encoding), settings.sequence_length - EDGE_TOKENS)
    spans = drop_short_tail(spans, settings.minimum_sequence_tokens)
    first, count = covering(spans, entry_spans)
    for start, end in spans:
        text = np.append(ids[start:end], facts.sep)
        sequences.tokens.append(padded_row(settings.sequence_length, facts.pad, [facts.cls], text))
        sequences.doc_ids.append(doc_id)
    sequences.first += first.tolist()
    sequences.count += count.tolist()


def _encode(text: str, document: Document, facts: TokenizerFacts) -> Encoding:
    try:
        encoding = _backend(facts.file, facts.fingerprint).encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise CorpusError(
            f"{document.place}: the tokenizer fails on this document ({error}); use another one"
        ) from error
    return encoding


@lru_cache(maxsize=1)
def _backend(file: str, fingerprint: str) -> Tokenizer:
    """The tokenizer, read once in each process; another fingerprint is another tokenizer."""
    return Tokenizer.from_file(file)


def _stack(
    rows: list[NDArray[np.int64]], length: int, dtype: type[np.generic]
) -> NDArray[np.generic]:
    return np.array(rows, dtype=dtype).reshape(-1, length)
