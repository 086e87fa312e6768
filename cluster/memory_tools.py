"""Looking into a memory through a model: the entries that it finds for a sentence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.editing.lookup import entries_by_document
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.api import Entry, Memory, Retrieved
from memory_server.requests import MAX_TOP_K
from memory_server.store.names import INT64_MAX
from memory_server.store.store import Store

MASK = "[MASK]"


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One entry that was found; `score` is the inner product of its key with the query."""

    rank: int
    score: float
    entry: Entry


def nearest_entries(
    store: Path | str,
    model: Path,
    sentence: str,
    *,
    k: int,
    exclude_document: int | None = None,
    domains: Collection[str] = (),
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> list[Hit]:
    """Find the entries nearest to a sentence; blocks while every entry's key is computed.

    Args:
        store: the memory's store.
        model: directory of a trained model with its tokenizer.
        sentence: text; [MASK] stands for the tokenizer's mask token.
        k: most entries to return.
        exclude_document: id of a document whose entries are left out.
        domains: only their entries; none named: those of all that are plugged.
        device: "auto", "cpu" or "cuda".
        say: told what is going on.

    Returns:
        At most k hits, best first; fewer only where fewer entries are left by the exclusion.

    Raises:
        ConfigError: a sentence or k that cannot work, or a model that does not fit.
        TokenizerMismatch: the entries are another tokenizer's. StoreError: no usable store.
        UnknownDomain: one of them is not plugged; names those that are.
    """
    opened = Store.open(store)
    entries = sum(ref.live for ref in opened.manifest().of_domains(domains))
    _check_k(k, entries, str(store))
    check_document(exclude_document, opened)
    trained = load_trained_model(model, device=chosen_device(device))
    tokens_1T = sentence_tokens(trained, sentence)
    say(f"computing the keys of {entries:,} entries ...")
    with trained.memory(store, domains=domains) as memory:
        return _search(trained, memory, tokens_1T, k, exclude_document)


def nearest_in(
    memory: Memory,
    model: Path,
    sentence: str,
    *,
    k: int,
    exclude_document: int | None = None,
    device: str = "auto",
) -> list[Hit]:
    """Find the entries nearest to a sentence in a memory that runs, with the keys that it has.

    Args and return value as of `nearest_entries`. The memory's keys should be of this model's
    weights, or of near ones: nothing can tell.

    Raises:
        ConfigError: a sentence or k that cannot work, or a model of another key width.
        TokenizerMismatch: the entries are another tokenizer's.
    """
    info = memory.info()
    _check_k(k, info.entries, "that is served")
    check_document(exclude_document)
    trained = load_trained_model(model, device=chosen_device(device))
    trained.check_fingerprint(info.tokenizer_fingerprint, "the memory that is served")
    if trained.model.config.key_size != info.key_width:
        raise ConfigError(
            f"the model {model} makes keys of {trained.model.config.key_size} numbers, the memory "
            f"that is served has {info.key_width}; give the model that made its keys"
        )
    return _search(trained, memory, sentence_tokens(trained, sentence), k, exclude_document)


def _check_k(k: int, entries: int, memory: str) -> None:
    most = min(entries, MAX_TOP_K)
    if not 1 <= k <= most:
        raise ConfigError(
            f"k = {k}: must be from 1 to {most} (the memory {memory} holds {entries} entries)"
        )


def check_document(exclude: int | None, store: Store | None = None) -> None:
    """Check the id of a document whose entries are to be left out.

    Args:
        exclude: None: nothing is.
        store: where it must have entries; None: only the number is looked at.

    Raises:
        ConfigError: no id, or no entry of the store's newest version is of that document.
    """
    if exclude is None:
        return
    if not 0 <= exclude <= INT64_MAX:
        raise ConfigError(f"document {exclude}: ids are from 0 to 2**63-1")
    if store is not None and not entries_by_document(store, store.manifest(), [exclude]):
        raise ConfigError(
            f"document {exclude}: no entry of it lives in the memory {store.path}, so there is "
            "nothing to leave out; `pluglm memory search --json` shows the ids"
        )


def sentence_tokens(trained: TrainedModel, sentence: str) -> Tensor:
    """A sentence as the model was trained on it: [CLS] tokens [SEP], int64 [1,T].

    Raises:
        ConfigError: it is empty, no Unicode, or longer than the model reads.
    """
    tokenizer = trained.tokenizer
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the sentence {sentence!a} is no valid UTF-8") from error
    text = sentence.replace(MASK, tokenizer.mask_token)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ConfigError(f"the sentence {sentence!r} has no tokens; give some text")
    if len(ids) + 2 > trained.max_positions:
        raise ConfigError(
            f"the sentence has {len(ids)} tokens, but the model {trained.path} reads at most "
            f"{trained.max_positions - 2}; shorten it"
        )
    return torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])


def chosen_device(device: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        ConfigError: a GPU is asked for on a machine without.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError('device = "cuda": this machine shows no CUDA GPU to torch; use "cpu"')
    return "cuda" if available and device == "auto" else device.replace("auto", "cpu")


@torch.no_grad()
def _search(
    trained: TrainedModel, memory: Memory, tokens_1T: Tensor, k: int, exclude: int | None
) -> list[Hit]:
    """What the last memory layer was given, when the layers before it read the memory too."""
    document_1 = None if exclude is None else torch.tensor([exclude], device=trained.device)

    def lookup(queries_BQ: Tensor) -> Retrieved:
        return memory.search(queries_BQ, k, exclude_doc_ids=document_1)

    output = trained.model(tokens_1T.to(trained.device), lookup=lookup)
    found = cast(Retrieved, output.retrievals[-1].retrieved)
    scores = [float(s) for s, i in zip(found.scores[0], found.ids[0], strict=True) if int(i) >= 0]
    entries = memory.entries([int(i) for i in found.ids[0] if int(i) >= 0])
    return [
        Hit(rank=rank, score=score, entry=entry)
        for rank, (score, entry) in enumerate(zip(scores, entries, strict=True), start=1)
    ]
