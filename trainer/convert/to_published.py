"""A legacy model and its memory as the files that the published code reads.

OUT/ckpt.pt          names and tensors, aliases included
OUT/config.json      settings, as `model_args`
OUT/tokenized.npy    int16 [N,S], where there is a memory; rows in the order of the entries' ids
OUT/keys.npy, OUT/values.npy    where they are stored
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memory_server.errors import MemoryServerError
from memory_server.keys.stored_vectors import FloatArray, StoredVectors
from memory_server.store.segments import Int64Array
from memory_server.store.store import Store
from model import PlugLMConfig
from model.published import to_published
from model.published_config import config_to_published
from trainer.convert.bert_source import ModelSource
from trainer.convert.errors import ConversionError
from trainer.convert.files import load_tensors, read_json, refuse_full, written_beside
from trainer.convert.model_files import shapes_of
from trainer.convert.published import LEFT, MEMORY, MODEL, VECTORS
from trainer.convert.report import ConversionReport
from trainer.export import write_json

CHECKPOINT, CONFIG = "ckpt.pt", "config.json"
DOCUMENTS, KEYS, VALUES = "tokenized.npy", "keys.npy", "values.npy"
MOST_TOKENS = 1 << 15  # the published code reads documents as int16
BLOCK_ROWS = 1 << 16


def convert_to_published(source: Path, out: Path) -> ConversionReport:
    """Write back what `convert_published` read, or any legacy model and its memory.

    Args:
        source: a directory with model/ and, where there is a memory, memory/ and vectors/; or a
            model directory alone.
        out: the directory to make; written beside and renamed.

    Raises:
        ConversionError: the published code cannot express it; says why.
        StoreError: the memory is damaged.
    """
    refuse_full(out)
    model = source if (source / "config.json").is_file() else source / MODEL
    if not (model / "config.json").is_file():
        raise ConversionError(
            f"there is no model at {source} (no config.json, no {MODEL}/config.json); give the "
            "directory that `pluglm convert published` wrote"
        )
    config = open_config(model)
    try:
        settings = config_to_published(config)
    except ValueError as error:
        raise ConversionError(f"{model} cannot be written as published: {error}") from error
    state = ModelSource(path=model, config=config, model_type=config.model_type).tensors()
    _check_whole(model, state, config)
    published = to_published(state, config)
    if (source / LEFT).is_file():
        published |= load_tensors(source / LEFT)
    store = _store(source / MEMORY, config)
    vectors = _vectors(source / VECTORS, store)
    with written_beside(out) as directory:
        torch.save(published, directory / CHECKPOINT)
        facts: dict[str, Any] = {}
        notes: tuple[str, ...] = ()
        if store is not None:
            ids = _write_documents(directory / DOCUMENTS, store)
            settings["tokenized_document_path"] = str((out / DOCUMENTS).absolute())
            facts["entries"] = len(ids)
            if not np.array_equal(ids, np.arange(len(ids))):
                notes = ("published arrays have rows only: the entries' ids are not kept",)
            if vectors is not None:
                _write_vectors(directory, vectors, ids)
        args = {"data_args": {}, "model_args": settings, "training_args": {}}
        write_json(directory / CONFIG, args)
    return ConversionReport(
        source=str(source), out=str(out), taken=_pairs(published, state), memory=facts, notes=notes
    )


def open_config(model: Path) -> PlugLMConfig:
    """The configuration of a PlugLM directory. Raises ConversionError: it is of another model."""
    raw = read_json(model / "config.json")
    if raw.get("model_type") != PlugLMConfig.model_type:
        raise ConversionError(
            f"{model} is a {raw.get('model_type')!r} model, not a PlugLM; give a directory that "
            "`pluglm convert published` wrote"
        )
    try:
        return PlugLMConfig.from_dict(raw)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{model / 'config.json'}: {error}") from error


def _check_whole(model: Path, state: dict[str, Tensor], config: PlugLMConfig) -> None:
    shapes = shapes_of(config)
    problems = [f"lacks {n}" for n in shapes if n not in state]
    problems += [f"has {n}, which is no part of a masked-LM PlugLM" for n in state.keys() - shapes]
    problems += [
        f"has {n} of shape {list(state[n].shape)} instead of {list(shape)}"
        for n, shape in shapes.items()
        if n in state and state[n].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ConversionError(f"{model} {problems[0]}{more}; give a whole masked-LM model")


def _pairs(published: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, str]:
    """Published names to the model's, by the tensors themselves."""
    ours = {id(tensor): name for name, tensor in state.items()}
    return {name: ours.get(id(tensor), name) for name, tensor in published.items()}


def _store(path: Path, config: PlugLMConfig) -> Store | None:
    if not path.exists():
        return None
    if config.vocab_size > MOST_TOKENS:
        raise ConversionError(
            f"{path} cannot be written as published: documents are int16 there, which holds "
            f"{MOST_TOKENS} tokens, and the vocabulary has {config.vocab_size}"
        )
    return Store.open(path)


def _vectors(path: Path, store: Store | None) -> StoredVectors | None:
    if store is None or not path.exists():
        return None
    vectors = StoredVectors.open(path)
    values = vectors.values_NJH
    if values is not None and values.shape[1] != 1:
        raise ConversionError(
            f"{path} cannot be written as published: it has {values.shape[1]} values per entry, "
            "and the published code reads 1"
        )
    for segment, rows in _live(store):
        try:
            vectors.keys_of(segment.ids[rows], segment.tokens[rows])
        except MemoryServerError as error:
            raise ConversionError(str(error)) from error
    return vectors


def _live(store: Store) -> Any:
    """Each segment of the head with its rows that are not removed."""
    for ref in store.manifest().segments:
        segment = store.segment(ref)
        yield segment, np.setdiff1d(np.arange(segment.rows), store.deleted_rows(ref))


def _write_documents(path: Path, store: Store) -> Int64Array:
    """Write the live entries' tokens in the order of their ids, which are returned."""
    found = [segment.ids[rows] for segment, rows in _live(store)]
    ids: Int64Array = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
    shape = (len(ids), store.meta.entry_tokens)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape)
    for segment, rows in _live(store):
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            out[np.searchsorted(ids, segment.ids[block])] = segment.tokens[block]
    out.flush()
    return ids


def _write_vectors(directory: Path, vectors: StoredVectors, ids: Int64Array) -> None:
    rows = vectors.rows(ids)
    arrays: list[tuple[str, FloatArray]] = [(KEYS, vectors.keys_NQ)]
    if vectors.values_NJH is not None:
        arrays.append((VALUES, vectors.values_NJH[:, 0]))
    for name, array in arrays:
        shape = (len(ids), array.shape[1])
        out = np.lib.format.open_memmap(directory / name, mode="w+", dtype=array.dtype, shape=shape)
        for start in range(0, len(ids), BLOCK_ROWS):
            out[start : start + BLOCK_ROWS] = array[rows[start : start + BLOCK_ROWS]]
        out.flush()
