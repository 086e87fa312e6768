"""Passages to entries: text is cut as a corpus build cuts it, ready tokens are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.editing.passages import Passage
from cluster.editing.tokenizer import StoreTokenizer
from memory_server.store.segments import SegmentMeta
from trainer.corpus.entries import cut_entries, entry_prefix, padded_row
from trainer.corpus.errors import CorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A passage's entries: token rows, int64 [S], and the piece of text that each one is."""

    passage: Passage
    tokens: list[NDArray[np.int64]]
    texts: list[str]


class Cutter:
    """Makes entries of one store. The tokenizer is loaded when the first text comes."""

    def __init__(
        self,
        meta: SegmentMeta,
        tokenizer: Callable[[], StoreTokenizer],
        *,
        title_in_entry: bool,
    ) -> None:
        self._meta = meta
        self._load = tokenizer
        self._title_in_entry = title_in_entry

    def cut(self, passages: Sequence[Passage]) -> list[Cut]:
        """Make the entries of some passages; one that tokenises to nothing has none.

        Raises:
            CorpusError: tokens too many, beyond the vocabulary, or text that cannot be tokenised;
            names the row.
        """
        texts = [p for p in passages if p.tokens is None]
        encodings = iter(self._encode(texts, [p.text for p in texts]))
        titled = [p for p in texts if self._title_in_entry and p.title]
        titles = iter(self._encode(titled, [p.title for p in titled]))
        cuts = []
        for passage in passages:
            if passage.tokens is not None:
                row = self._given(passage.tokens, passage.place)
                cuts.append(Cut(passage=passage, tokens=[row], texts=[passage.text]))
                continue
            title = next(titles) if self._title_in_entry and passage.title else None
            made = cut_entries(
                next(encodings),
                passage.text,
                prefix=entry_prefix(self._tokenizer.cls, title, self._meta.entry_tokens),
                entry_tokens=self._meta.entry_tokens,
                pad=self._tokenizer.pad,
            )
            cuts.append(Cut(passage=passage, tokens=made.tokens, texts=made.texts))
        return cuts

    @cached_property
    def _tokenizer(self) -> StoreTokenizer:
        found = self._load()
        if found.pad != self._meta.pad_token_id:
            raise CorpusError(
                f"the tokenizer {found.path} pads with token {found.pad}, the memory with "
                f"{self._meta.pad_token_id}; give the tokenizer that made it as --tokenizer DIR"
            )
        return found

    def _encode(self, passages: Sequence[Passage], texts: list[str]) -> list[Any]:
        if not texts:
            return []
        backend = self._tokenizer.backend
        try:
            encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            where = passages[0].place
            if len(passages) > 1:
                where = f"from {where} to {passages[-1].place}"
            raise CorpusError(
                f"{where}: the tokenizer fails on this text ({error}); leave it out"
            ) from error
        return encodings

    def _given(self, tokens: Sequence[int], place: str) -> NDArray[np.int64]:
        meta = self._meta
        if len(tokens) > meta.entry_tokens:
            raise CorpusError(
                f"{place}: an entry of {len(tokens)} tokens; entries of this memory have at most "
                f"{meta.entry_tokens}: cut it, or give its text"
            )
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= meta.vocab_size:
            raise CorpusError(
                f"{place}: token id {low if low < 0 else high} is not in the vocabulary of "
                f"{meta.vocab_size} tokens; tokenise with the memory's own tokenizer, or give text"
            )
        if all(token == meta.pad_token_id for token in tokens):
            raise CorpusError(f"{place}: all tokens are padding; an entry needs others")
        # A given token may be beyond int64, which the range check has refused by now.
        return padded_row(meta.entry_tokens, meta.pad_token_id, [], np.array(tokens, np.int64))
