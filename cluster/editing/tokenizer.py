"""The tokenizer of a store: found beside it or given, and proven by its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from memory_server.errors import StoreError, TokenizerMismatch
from memory_server.store.store import Store
from trainer.corpus.info import read_manifest

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class StoreTokenizer:
    """What turns text into a store's entries.

    Attributes:
        backend: a `tokenizers.Tokenizer`.
        cls, pad: the tokens that begin and fill an entry.
    """

    path: Path
    backend: Any
    cls: int
    pad: int


def find_tokenizer(store: Store, *, given: Path | None, near: Sequence[Path]) -> StoreTokenizer:
    """Load the tokenizer that made a store's entries.

    Args:
        given: a directory with a tokenizer, which must be the store's; None: look for it.
        near: directories beside which it may lie: the store, its corpus, a run that read it.

    Raises:
        TokenizerMismatch: it is another one's; names both fingerprints.
        ConfigError: there is none. CorpusError: it cannot be loaded.
    """
    places = [given] if given is not None else _places(near)
    others = []
    for place in places:
        found, fingerprint = _load(place)
        if fingerprint == store.meta.tokenizer_fingerprint:
            return found
        others.append(f"{place} (fingerprint {fingerprint})")
    if others:
        raise TokenizerMismatch(
            f"the memory {store.location} was made with the tokenizer of fingerprint "
            f"{store.meta.tokenizer_fingerprint}, not with {' or '.join(others)}; give the right "
            "one as --tokenizer DIR: that of its corpus, or of a model trained on it"
        )
    raise ConfigError(
        f"no tokenizer lies beside the memory {store.location}; give the one that made it as "
        "--tokenizer DIR: its corpus's tokenizer/, or a model trained on it"
    )


def titles_in_entries(near: Sequence[Path]) -> bool:
    """Whether the corpus that a store belongs to begins its entries with titles."""
    for place in near:
        for directory in (place, place.parent):
            manifest = read_manifest(directory)
            if manifest is not None:
                return bool(manifest["arguments"].get("title_in_entry", False))
    return False


def store_neighbours(store: Store) -> list[Path]:
    """Where a store's tokenizer may lie; nowhere for a store that is no local directory."""
    try:
        return [store.path]
    except StoreError:
        return []


def _places(near: Sequence[Path]) -> list[Path]:
    """A corpus has tokenizer/, a run model/ with one in it, and the memory may lie in either."""
    found: list[Path] = []
    for place in near:
        for directory in (place, place.parent):
            for candidate in (directory / "tokenizer", directory / "model", directory):
                if (candidate / TOKENIZER_FILE).is_file() and candidate not in found:
                    found.append(candidate)
    return found


def _load(path: Path) -> tuple[StoreTokenizer, str]:
    from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint

    loaded: Any = load_tokenizer(path)
    tokenizer = StoreTokenizer(
        path=path,
        backend=loaded.backend_tokenizer,
        cls=int(loaded.cls_token_id),
        pad=int(loaded.pad_token_id),
    )
    return tokenizer, tokenizer_fingerprint(loaded)
