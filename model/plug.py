"""Plugging a memory into a model, and checking that the two belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from model.config import PlugLMConfig
from model.retrieval import Lookup, RetrievedEntries


@runtime_checkable
class Searchable(Protocol):
    """A memory, as far as a model needs to know."""

    def search(self, queries_BQ: Tensor, k: int) -> RetrievedEntries:
        """The k best entries of each query."""


class Plugged:
    """A lookup as a model holds it: deep copies of the model share it, pickles leave it out.

    A memory is a store's answer in this process, with locks, threads and mapped files: it is no
    part of the weights. What comes out of a pickle has no memory attached.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def __call__(self, queries_BQ: Tensor) -> RetrievedEntries:
        return self._lookup(queries_BQ)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plugged:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def lookup_of(memory: Any, k: int | None, config: PlugLMConfig) -> Plugged:
    """The lookup of a memory, or of a plain callable.

    Args:
        memory: an object with `search(queries_BQ, k)`, checked against its `info()` where it has
            one, or a callable that takes queries [B,Q] and returns `RetrievedEntries`.
        k: entries per query; None: `config.top_k`. A callable decides for itself.

    Raises:
        TypeError: neither. ValueError: the memory does not fit the model; names what differs.
    """
    if not config.num_memory_layers:
        raise ValueError(
            "this model has no memory layer (num_memory_layers 0), so it can read no memory; build "
            "it with at least one"
        )
    if isinstance(memory, Searchable):
        wanted = config.top_k if k is None else k
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            raise TypeError(f"k is {wanted!r}; allowed: a whole number, or None for config.top_k")
        if wanted < 1:
            raise ValueError(f"k is {wanted}; allowed: 1 or more entries per query")
        info = getattr(memory, "info", None)
        if callable(info):
            _check_fit(info(), wanted, config)
        return Plugged(lambda queries_BQ: memory.search(queries_BQ, wanted))
    if not callable(memory):
        raise TypeError(
            f"attach() was given {type(memory).__name__}; allowed: a memory with "
            "search(queries, k), a callable that takes queries, or None"
        )
    if k is not None:
        raise ValueError(
            f"k is {k}, but a plain lookup decides itself how many entries it returns; leave k out"
        )
    return Plugged(memory)


def _nothing() -> None:
    """What a pickled lookup becomes."""


def _check_fit(info: Any, k: int, config: PlugLMConfig) -> None:
    """Compare a memory's description, as far as it tells, with the model."""
    width = getattr(info, "key_width", None)
    if width is not None and width != config.key_size:
        raise ValueError(
            f"the memory's keys have width {width}, but the model's queries {config.key_size} "
            "(key_size); make the memory's keys with this model"
        )
    tokens, longest = getattr(info, "entry_tokens", None), config.max_position_embeddings
    if tokens is not None and tokens > longest:
        raise ValueError(
            f"the memory's entries have up to {tokens} tokens, but the model has {longest} "
            f"positions (max_position_embeddings); build entries of at most {longest} tokens"
        )
    entries = getattr(info, "entries", None)
    if entries is not None and k > entries:
        raise ValueError(
            f"k is {k}, but the memory holds {entries} entries; allowed: 1 to {entries} (k of "
            "attach, or the model's top_k)"
        )
    pad, our_pad = getattr(info, "pad_token_id", None), config.pad_token_id or 0
    if pad is not None and pad != our_pad:
        raise ValueError(
            f"the memory pads its entries with token {pad}, the model with {our_pad} "
            "(pad_token_id); build the memory again with the model's tokenizer"
        )
    theirs, ours = getattr(info, "tokenizer_fingerprint", ""), config.tokenizer_fingerprint
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"the memory was made with another tokenizer (fingerprint {theirs}) than the model "
            f"({ours}, tokenizer_fingerprint); build the memory again with the model's tokenizer"
        )
