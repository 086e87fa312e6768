"""A published memory: tokens, keys and values as .npy files, checked and read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server.keys.stored_vectors import check_vectors
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import PlugLMConfig
from trainer.convert.errors import ConversionError
from trainer.convert.files import map_array

SEGMENT_ROWS = 1 << 17
NO_TOKENIZER = "not-given"
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class PublishedMemory:
    """The mapped arrays: documents integers [N,S], keys [N,Q], values [N,H] of 16 or 32 bits."""

    documents_NS: Array
    keys_NQ: Array | None
    values_NH: Array | None

    @property
    def rows(self) -> int:
        """N."""
        return len(self.documents_NS)


def open_memory(
    documents: Path | None,
    keys: Path | None,
    values: Path | None,
    config: PlugLMConfig,
    *,
    tokenizer_size: int | None,
) -> PublishedMemory | None:
    """Map the arrays and check every number, before anything is written.

    Args:
        tokenizer_size: tokens of the tokenizer, where one is given.

    Returns:
        None if no array is given.

    Raises:
        ConversionError: names the file and what is wrong with it.
    """
    if documents is None:
        if keys is None and values is None:
            return None
        raise ConversionError(
            f"{keys or values} was given without the tokens of its entries; give --documents too, "
            "the array that the keys were made from"
        )
    if values is not None and keys is None:
        raise ConversionError(
            f"{values} was given without keys, by which its rows are found; give --keys too"
        )
    documents_NS = map_array(documents)
    _check_documents(documents, documents_NS, config, tokenizer_size)
    rows = len(documents_NS)
    return PublishedMemory(
        documents_NS=documents_NS,
        keys_NQ=_vectors(keys, documents, rows, config.key_size, "query_size"),
        values_NH=_vectors(values, documents, rows, config.hidden_size, "hidden_size"),
    )


def write_store(path: Path, memory: PublishedMemory, config: PlugLMConfig, tokenizer: Any) -> Store:
    """Write the documents as a store: row numbers are the ids of entries and of documents.

    Args:
        tokenizer: gives the entries' text from their tokens; None leaves the text empty.
    """
    # Heavy only through the tokenizer, and only where there is one.
    from trainer.corpus.tokenizer import tokenizer_fingerprint

    store = Store.create(
        path,
        tokenizer_fingerprint=(
            NO_TOKENIZER if tokenizer is None else tokenizer_fingerprint(tokenizer)
        ),
        entry_tokens=memory.documents_NS.shape[1],
        vocab_size=config.vocab_size,
        pad_token_id=config.pad_token_id or 0,
    )
    segments = []
    for start, block in _blocks(memory.documents_NS, SEGMENT_ROWS):
        ids = np.arange(start, start + len(block))
        texts = [""] * len(block)
        if tokenizer is not None:
            texts = tokenizer.batch_decode(block.tolist(), skip_special_tokens=True)
        segment = store.incoming / f"rows-{start}.arrow"
        write_segment(
            segment,
            ids=ids,
            doc_ids=ids,
            tokens_NS=block,
            texts=texts,
            titles=[""] * len(block),
            sources=["published"] * len(block),
            meta=store.meta,
        )
        segments.append(segment)
    if segments:
        store.commit(add_segments=segments, message="converted from published arrays")
    return store


def _check_documents(
    path: Path, documents_NS: Array, config: PlugLMConfig, tokenizer_size: int | None
) -> None:
    if documents_NS.ndim != 2 or documents_NS.dtype.kind != "i" or not documents_NS.shape[1]:
        raise ConversionError(
            f"{path} is {documents_NS.dtype} of shape {documents_NS.shape}; tokenised documents "
            "are signed integers (int16) of shape [entries, tokens]"
        )
    tokens, longest = documents_NS.shape[1], config.max_position_embeddings
    if tokens > longest:
        raise ConversionError(
            f"{path} has entries of {tokens} tokens, but the model has {longest} positions "
            "(max_position_embeddings); give the documents that it was trained with"
        )
    allowed = config.vocab_size if tokenizer_size is None else tokenizer_size
    for start, block in _blocks(documents_NS, SEGMENT_ROWS):
        bad = (block < 0) | (block >= allowed)
        if bool(bad.any()):
            row, column = (int(i) for i in np.argwhere(bad)[0])
            owner = "model's vocabulary" if tokenizer_size is None else "tokenizer"
            raise ConversionError(
                f"{path} has token {int(block[row, column])} in row {start + row}; the {owner} has "
                f"the ids 0 to {allowed - 1}, so these are another tokenizer's entries"
            )


def _vectors(
    path: Path | None, documents: Path, rows: int, width: int, setting: str
) -> Array | None:
    if path is None:
        return None
    array = map_array(path)
    if array.ndim != 2 or array.shape[1] != width:
        raise ConversionError(
            f"{path} has shape {array.shape}, but the configuration's {setting} is {width}: "
            f"[entries, {width}] is needed; give the array that belongs to this model"
        )
    if len(array) != rows:
        raise ConversionError(
            f"{path} has {len(array)} rows, but {documents} has {rows}; they must be of the same "
            "entries"
        )
    try:
        check_vectors(str(path), array, rows=rows, axes=2)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return array


def _blocks(array: Array, rows: int) -> Iterator[tuple[int, Array]]:
    """Parts of a mapped array, read one at a time."""
    for start in range(0, len(array), rows):
        yield start, np.asarray(array[start : start + rows])
