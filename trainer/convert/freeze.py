"""Entries encoded once with a model and kept, for fine-tuning that reads a frozen memory."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from memory_server.errors import StoreError
from memory_server.keys.stored_vectors import ABOUT, StoredVectors
from memory_server.store.store import Store
from model import PlugLMModel
from trainer.convert.errors import ConversionError

BATCH_ROWS = 64


def freeze_vectors(
    model: PreTrainedModel,
    store: Store | Path | str,
    path: Path | str,
    *,
    content_version: str | None = None,
    domains: Collection[str] = (),
) -> StoredVectors:
    """Encode a store's entries with a model's current weights and keep keys and values.

    The model's mode and random state are left as they were; it encodes in eval mode.

    Args:
        model: `PlugLMModel` or any model with a head around it, on any device.
        store: the memory; its head unless content_version says otherwise.
        domains: only entries of these; none named: all that are plugged.
        path: the directory to make. Keys are stored as float32, values as float16.

    Raises:
        ConversionError: the model makes no keys, or the entries are too long or not its tokens; a
            value is too large for float16. StoreError: the store is unusable, or the path has
            vectors.
    """
    path = Path(path)
    if (path / ABOUT).exists():
        raise StoreError(f"{path} holds vectors already; choose another path, or remove it")
    opened = store if isinstance(store, Store) else Store.open(store)
    encoder = model.base_model
    if not isinstance(encoder, PlugLMModel):
        raise ConversionError(f"{type(model).__name__} is no PlugLM; give one")
    _check_fit(encoder, opened)
    refs = opened.manifest(content_version).of_domains(domains)
    parts = [(segment := opened.segment(ref), np.setdiff1d(np.arange(segment.rows),
              opened.deleted_rows(ref))) for ref in refs]  # fmt: skip
    total = sum(len(rows) for _, rows in parts)
    config = encoder.config
    per_entry = opened.meta.entry_tokens if config.value_pooling == "tokens" else 1
    path.parent.mkdir(parents=True, exist_ok=True)
    modes = {module: module.training for module in model.modules()}
    # Gathered in files, not in memory: values of millions of entries do not fit there.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".freezing-") as scratch:
        ids = np.empty(total, dtype=np.int64)
        tokens = _mapped(Path(scratch) / "tokens", (total, opened.meta.entry_tokens), np.int32)
        keys = _mapped(Path(scratch) / "keys", (total, config.key_size), np.float32)
        values = _mapped(
            Path(scratch) / "values", (total, per_entry, config.hidden_size), np.float16
        )
        model.eval()
        try:
            row = 0
            for segment, live in parts:
                for start in range(0, len(live), BATCH_ROWS):
                    chosen = live[start : start + BATCH_ROWS]
                    here = slice(row, row + len(chosen))
                    ids[here], tokens[here] = segment.ids[chosen], segment.tokens[chosen]
                    keys[here], values[here] = _encoded(encoder, tokens[here])
                    row += len(chosen)
        finally:
            for module, training in modes.items():
                module.training = training
        try:
            return StoredVectors.write(path, ids, keys, values, tokens_NS=tokens)
        except ValueError as error:
            raise ConversionError(f"the entries of {opened.path}: {error}") from error


def _encoded(encoder: PlugLMModel, tokens_nS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    device = encoder.embeddings.word_embeddings.weight.device
    with torch.inference_mode():
        entries = encoder.encode_entries(torch.from_numpy(tokens_nS.astype(np.int64)).to(device))
    keys_nQ = entries.keys_nQ.float().cpu().numpy()
    with np.errstate(over="ignore"):  # infinity is refused when all is written
        values_nJH = entries.values_nJH.float().cpu().numpy().astype(np.float16)
    return keys_nQ, values_nJH


def _mapped(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if not all(shape):  # nothing can be mapped of an empty file
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, mode="w+", dtype=dtype, shape=shape)


def _check_fit(encoder: PlugLMModel, store: Store) -> None:
    config, meta = encoder.config, store.meta
    if not config.num_memory_layers:
        raise ConversionError("this model has no memory layer, so it makes no keys")
    if meta.entry_tokens > config.max_position_embeddings:
        raise ConversionError(
            f"the memory {store.path} has entries of {meta.entry_tokens} tokens, but the model "
            f"reads at most {config.max_position_embeddings}; build shorter entries"
        )
    theirs, ours = meta.tokenizer_fingerprint, config.tokenizer_fingerprint
    if (ours and theirs != ours) or meta.vocab_size > config.vocab_size:
        raise ConversionError(
            f"the memory {store.path} was made with another tokenizer (fingerprint {theirs}, "
            f"{meta.vocab_size} tokens) than the model ({ours or 'not known'}, "
            f"{config.vocab_size} tokens); build it again with the model's tokenizer"
        )
    if not bool(encoder.entry_encoder.key_proj.weight.any()):
        raise ConversionError(
            "this model's key projection is zeros, because its checkpoint was published with fixed "
            "keys; take the keys that were published with it"
        )
