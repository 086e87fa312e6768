"""From a memory's answer to the keys and values that a memory layer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.config import PlugLMConfig
from model.entry_encoder import EncodedEntries
from model.inputs import describe, out_of_range
from model.retrieval import Lookup, ReadEntries, RetrievedEntries


class QueryNotFinite(ValueError):
    """A query holds NaN or infinity: the model's weights or activations do."""


EncodeEntries = Callable[[Tensor], EncodedEntries]
"""int64 tokens [n,S] to entries encoded with the current weights, with gradient."""


def read_memory(
    query_BQ: Tensor,
    *,
    lookup: Lookup,
    encode: EncodeEntries,
    config: PlugLMConfig,
    layer: int,
) -> ReadEntries:
    """Ask the memory, check what it answers, and make the keys and values to read.

    Each distinct entry of the micro-batch is encoded once.

    Args:
        query_BQ: the layer's queries; searched in float32 and without gradient.
        lookup: the memory; with a true attribute `takes_any_query` it is also asked what is not
            finite, because ranks that train together must all get to the end of a pass.
        encode: the model's entry encoder.
        layer: index of the asking layer, for messages.

    Raises:
        QueryNotFinite: a query holds NaN or infinity. ValueError: the answer has wrong shapes,
            dtypes, or tokens that this model does not have.
    """
    asked_BQ = asked_queries(query_BQ, lookup, layer)
    # Exported graphs get what was retrieved as an input, which their lookup hands over.
    exporting = torch.compiler.is_exporting()
    retrieved = lookup(asked_BQ) if exporting else _search(lookup, asked_BQ)
    _check_answer(retrieved, query_BQ.shape[0], config)
    tokens_BKS = retrieved.tokens.to(query_BQ.device, torch.int64)
    ids_BK = retrieved.ids.to(query_BQ.device, torch.int64)
    found_BK1 = (ids_BK >= 0).unsqueeze(-1)
    per_token = config.value_pooling == "tokens"
    keys_BKQ = values_BKJH = None
    mask_BKJ = found_BK1
    if config.fixed_keys:
        keys_BKQ = _stored(retrieved, "keys", query_BQ)
    if config.fixed_values:
        values_BKJH = _stored(retrieved, "values", query_BQ)
        if per_token:
            mask_BKJ = found_BK1 & (tokens_BKS != (config.pad_token_id or 0))
    if keys_BKQ is None or values_BKJH is None:
        encoded, row_N = _encode_distinct(tokens_BKS, ids_BK, encode, config)
        if keys_BKQ is None:
            keys_BKQ = _placed(encoded.keys_nQ, row_N, ids_BK)
        if values_BKJH is None:
            values_BKJH = _placed(encoded.values_nJH, row_N, ids_BK)
            mask_BKJ = found_BK1 & _placed(encoded.mask_nJ, row_N, ids_BK)
    return ReadEntries(
        retrieved=retrieved, keys_BKQ=keys_BKQ, values_BKJH=values_BKJH, mask_BKJ=mask_BKJ
    )


def asked_queries(query_BQ: Tensor, lookup: object, layer: int) -> Tensor:
    """What a memory is asked, float32 and detached. Raises QueryNotFinite; see `read_memory`."""
    asked_BQ = query_BQ.detach().float()
    checked = not torch.compiler.is_compiling() and not getattr(lookup, "takes_any_query", False)
    if checked and not bool(torch.isfinite(asked_BQ).all()):
        raise QueryNotFinite(
            f"the query of memory layer {layer} holds NaN or infinity, so nothing can be searched; "
            "the weights or the activations below it are not finite (a diverged training, or a "
            "damaged checkpoint)"
        )
    return asked_BQ


def _call(lookup: Lookup, queries_BQ: Tensor) -> RetrievedEntries:
    return lookup(queries_BQ)


# Outside of compiled graphs: a memory searches with locks, threads and mapped files.
_search: Callable[[Lookup, Tensor], RetrievedEntries] = torch.compiler.disable(_call)


def _encode_distinct(
    tokens_BKS: Tensor, ids_BK: Tensor, encode: EncodeEntries, config: PlugLMConfig
) -> tuple[EncodedEntries, Tensor | None]:
    """Encode each entry once.

    Returns:
        (entries [n]; the row of each of the B·K places, int64, or None: row after row).
    """
    tokens_NS = tokens_BKS.flatten(0, 1)
    if torch.compiler.is_compiling() or not ids_BK.numel():
        # How many are distinct is not known while a graph is traced.
        return encode(tokens_NS), None
    # Columns that are padding in every entry are left out.
    used_S = (tokens_NS != (config.pad_token_id or 0)).any(0)
    longest = int(used_S.nonzero()[-1]) + 1 if bool(used_S.any()) else 1
    tokens_NS = tokens_NS[:, :longest]
    ids_N = ids_BK.flatten()
    distinct_n, row_N = torch.unique(ids_N, return_inverse=True)
    if len(distinct_n) == len(ids_N):
        return encode(tokens_NS), None
    # Any place that holds an entry will do: equal ids have equal tokens.
    every_N = torch.arange(len(ids_N), device=ids_N.device)
    place_n = torch.empty_like(distinct_n).scatter_(0, row_N, every_N)
    distinct_nS = tokens_NS[place_n]
    differs_N = (distinct_nS[row_N] != tokens_NS).any(1) & (ids_N >= 0)
    if bool(differs_N.any()):
        wrong = int(ids_N[differs_N][0])
        raise ValueError(
            f"the memory answered with the id {wrong} for entries with different tokens; an id "
            "names one entry of the whole memory, not a place in one query's answer"
        )
    return encode(distinct_nS), row_N


def _placed(of_n: Tensor, row_N: Tensor | None, ids_BK: Tensor) -> Tensor:
    """What belongs to entries [n,...] at their places: [B,K,...]."""
    # Not by indexing with a tensor, whose backward pass on the CPU is the slower one.
    of_N = of_n if row_N is None else of_n.index_select(0, row_N)
    placed: Tensor = of_N.unflatten(0, tuple(ids_BK.shape))
    return placed


def _stored(retrieved: RetrievedEntries, name: str, like: Tensor) -> Tensor:
    """The memory's own vectors, without gradient, at least in the model's precision."""
    vectors: Tensor = getattr(retrieved, name)
    return vectors.detach().to(like.device, torch.promote_types(vectors.dtype, like.dtype))


def _check_answer(retrieved: Any, batch: int, config: PlugLMConfig) -> None:
    for name, dimensions in (("ids", 2), ("tokens", 3), ("doc_ids", 2)):
        given = getattr(retrieved, name, None)
        if (
            not isinstance(given, Tensor)
            or given.dtype not in (torch.int64, torch.int32)
            or given.ndim != dimensions
            or given.shape[0] != batch
            or given.shape[1] != retrieved.ids.shape[1]
        ):
            shape = "[B,K,S]" if name == "tokens" else "[B,K]"
            raise ValueError(
                f"the memory answered with {name} {describe(given)}; allowed: int64 {shape} for "
                f"B = {batch} queries, K the same in all"
            )
    length, longest = retrieved.tokens.shape[2], config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"the memory's entries have {length} tokens, but the model has {longest} positions "
            f"(max_position_embeddings); build a memory with entries of at most {longest} tokens"
        )
    if not length:
        raise ValueError(
            f"the memory answered with tokens {describe(retrieved.tokens)}; an entry has room for "
            "at least one token"
        )
    bad = out_of_range(retrieved.tokens, 0, config.vocab_size - 1)
    if bad is not None:
        raise ValueError(
            f"the memory's entries hold the token {bad}; allowed: 0 to {config.vocab_size - 1} "
            f"(vocab_size {config.vocab_size}); is it a memory of another tokenizer?"
        )
    bad = out_of_range(retrieved.ids, -1, torch.iinfo(torch.int64).max)
    if bad is not None:
        raise ValueError(
            f"the memory answered with ids that hold {bad}; allowed: 0 or more, -1 for none"
        )
    values = (1 if config.value_pooling != "tokens" else length, config.hidden_size)
    if config.fixed_keys:
        _check_vectors(retrieved, "keys", (config.key_size,))
    if config.fixed_values:
        _check_vectors(retrieved, "values", values)


def _check_vectors(retrieved: Any, name: str, shape: tuple[int, ...]) -> None:
    given = getattr(retrieved, name, None)
    if given is None:
        raise ValueError(
            f"fixed_{name} is True, but the memory's answer has no {name}; give a memory of stored "
            f"vectors, or set fixed_{name} to False"
        )
    allowed = (*retrieved.ids.shape, *shape)
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape != allowed:
        raise ValueError(
            f"the memory answered with {name} {describe(given)}; allowed: floating point "
            f"{list(allowed)}"
        )
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(given).all()):
        raise ValueError(
            f"the memory answered with {name} that hold NaN or infinity; its stored vectors are "
            "damaged"
        )
