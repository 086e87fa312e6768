"""A published checkpoint, its settings and its memory's arrays, as a model directory and a memory.

OUT/model            config.json, model.safetensors, the tokenizer where one is given
OUT/memory           the documents as a store; an entry's id is its row
OUT/vectors          the keys and values, bit for bit
OUT/left.safetensors tensors that the model has no place for, so that nothing is lost
OUT/conversion.json  what became of everything
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from memory_server.keys.stored_vectors import StoredVectors
from model import PlugLMConfig, PlugLMForMaskedLM
from model.published import TakenState, take_published
from model.published_config import config_from_published, taken_by_default
from trainer.convert.arrays import PublishedMemory, open_memory, write_store
from trainer.convert.errors import ConversionError
from trainer.convert.files import (
    load_tensors,
    read_json,
    refuse_full,
    save_tensors,
    written_beside,
)
from trainer.convert.model_files import shapes_of, write_model
from trainer.convert.report import ConversionReport
from trainer.convert.tokenizer import open_tokenizer
from trainer.corpus.tokenizer import tokenizer_fingerprint

MODEL, MEMORY, VECTORS, LEFT = "model", "memory", "vectors", "left.safetensors"
SAMPLE = 256  # entries whose keys are made anew, to see whether the stored ones are the model's
UNLIKE = 0.5  # mean cosine below which the report warns


def convert_published(
    checkpoint: Path,
    config: Path,
    out: Path,
    *,
    keys: Path | None = None,
    values: Path | None = None,
    documents: Path | None = None,
    tokenizer: Path | None = None,
) -> ConversionReport:
    """Convert a published checkpoint. Everything is checked before anything is written.

    Args:
        checkpoint: what the published code saved: names and tensors.
        config: its JSON.
        out: the directory to make; written beside and renamed.
        keys, values: float16 .npy [N,Q] and [N,H], mapped and never read whole; need documents.
        documents: int16 .npy [N,S], padded with the pad token.
        tokenizer: directory or vocabulary file; gives the entries their text.

    Raises:
        ConversionError: an input is unusable, or does not fit the others; names the file.
    """
    refuse_full(out)
    settings, defaults = _settings(config)
    try:
        taken = take_published(load_tensors(checkpoint), settings, shapes_of(settings))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{checkpoint} does not fit {config}: {error}") from error
    opened: Any = None if tokenizer is None else open_tokenizer(tokenizer, settings)
    memory = open_memory(
        documents,
        keys,
        values,
        settings,
        tokenizer_size=None if opened is None else len(opened),
    )
    if opened is not None:
        settings.tokenizer_fingerprint = tokenizer_fingerprint(opened)
    likeness = None if memory is None else _likeness(memory, settings, taken)
    report = _report(
        checkpoint,
        out,
        settings,
        defaults,
        taken,
        memory,
        likeness,
        has_tokenizer=opened is not None,
    )
    with written_beside(out) as directory:
        write_model(directory / MODEL, settings, taken.state, opened)
        kept = {n: t for n, t in taken.left.items() if not n.endswith(".position_ids")}
        if kept:
            save_tensors(directory / LEFT, kept)
        if memory is not None:
            _write_memory(directory, memory, settings, opened)
        report.write(directory)
    return report


def _likeness(memory: PublishedMemory, config: PlugLMConfig, taken: TakenState) -> float | None:
    """Mean cosine of stored keys and those that the model makes, over some entries with tokens.

    None where there are no keys, or the checkpoint has no key projection.
    """
    if memory.keys_NQ is None or taken.made:
        return None
    rows = np.unique(np.linspace(0, memory.rows - 1, min(memory.rows, SAMPLE)).astype(np.int64))
    tokens = torch.from_numpy(memory.documents_NS[rows].astype(np.int64))
    some = (tokens != (config.pad_token_id or 0)).any(1)
    if not bool(some.any()):
        return None
    model = PlugLMForMaskedLM(config)
    model.load_state_dict({n: t.float() for n, t in taken.state.items()}, strict=True)
    nn.Module.eval(model)
    with torch.inference_mode():
        made = model.pluglm.entry_keys(tokens[some])
    stored = torch.from_numpy(memory.keys_NQ[rows].astype(np.float32))[some]
    return float(torch.nn.functional.cosine_similarity(made, stored).mean())


def _settings(path: Path) -> tuple[PlugLMConfig, dict[str, Any]]:
    """The model's settings, and which of them the file does not name."""
    raw = read_json(path)
    try:
        return config_from_published(raw), taken_by_default(raw)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error


def _write_memory(
    directory: Path, memory: PublishedMemory, config: PlugLMConfig, tokenizer: Any
) -> None:
    write_store(directory / MEMORY, memory, config, tokenizer)
    if memory.keys_NQ is not None:
        values = memory.values_NH
        StoredVectors.write(
            directory / VECTORS,
            np.arange(memory.rows),
            memory.keys_NQ,
            None if values is None else values[:, None, :],
            tokens_NS=memory.documents_NS,
        )


def _report(
    checkpoint: Path,
    out: Path,
    config: PlugLMConfig,
    defaults: dict[str, Any],
    taken: TakenState,
    memory: PublishedMemory | None,
    likeness: float | None,
    *,
    has_tokenizer: bool,
) -> ConversionReport:
    notes = []
    if taken.disagreeing:
        notes.append(
            f"{len(taken.disagreeing)} names of shared tensors hold other numbers than the name "
            "that is loaded last, which was taken"
        )
    if taken.made:
        notes.append(
            "the configuration fixes keys or values, so the checkpoint has no projection for "
            "them; it is zeros, and nothing reads it"
        )
    fixed = [n for n, on in (("keys", config.fixed_keys), ("values", config.fixed_values)) if on]
    stored: tuple[Any, ...] = (None, None)
    if memory is not None:
        stored = (memory.keys_NQ, memory.values_NH)
    if any(on and s is None for on, s in zip((config.fixed_keys, config.fixed_values), stored,
                                            strict=True)):  # fmt: skip
        notes.append(
            f"the model reads fixed {' and '.join(fixed)}, so it needs a memory of stored ones"
        )
    if not has_tokenizer:
        notes.append("no tokenizer was given; the model and its memory do not know theirs")
    if likeness is not None and likeness < UNLIKE:
        notes.append(
            "the stored keys are unlike those that the model makes (mean cosine "
            f"{likeness:.2f}): they are of another checkpoint, or of other documents"
        )
    facts: dict[str, Any] = {}
    if memory is not None:
        facts = {"entries": memory.rows, "entry_tokens": int(memory.documents_NS.shape[1])}
        for name, array in (("keys", memory.keys_NQ), ("values", memory.values_NH)):
            facts[name] = None if array is None else f"{array.dtype} {list(array.shape)}"
    if likeness is not None:
        facts["likeness"] = round(likeness, 4)
    return ConversionReport(
        source=str(checkpoint),
        out=str(out),
        taken=taken.taken,
        left=tuple(taken.left),
        made=taken.made,
        disagreeing=taken.disagreeing,
        defaults=defaults,
        memory=facts,
        notes=tuple(notes),
    )
