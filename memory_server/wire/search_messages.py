"""The bodies of searches and of their hits: a fixed header and arrays, as they are most of what
travels. Everything is checked before it is used, as in `frames.unpack_body`, which reads the rest.

A search of some domains alone: a tag, the length of their names as JSON, these, filled up to a
multiple of 8, and then a search. Any other search is as it would be without domains.

A search: its header; documents to leave out, int64 [B], if there are any; queries, float16 or
float32 [B, Q]; the queries' exponents, int16 [B], with float16 only.

Hits: their header; ids and doc_ids, int64 [B, k]; scores, float32 [B, k]; tokens [B, k, S].
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server.errors import BadMessage
from memory_server.replies import ShardReply
from memory_server.wire.frames import ALIGNMENT, INTEGERS
from memory_server.wire.queries import Float32Array, QueryType, from_half, to_half

Int64Array = npt.NDArray[np.int64]

# Tag, exact, documents are left out, float16, rows, width, k.
_SEARCH = struct.Struct("<4s???xIIq")
_SEARCH_TAG = b"ask1"
# Tag, bytes of the names.
_DOMAINS = struct.Struct("<4sI")
_DOMAINS_TAG = b"dom1"
MAX_DOMAINS_BYTES = 64 << 10
# Tag, exact, type of tokens, rows, k, tokens of an entry, epoch, encoder step.
_HITS = struct.Struct("<4s?Bxx3Ixxxxqq")
_HITS_TAG = b"hit1"
_TOKEN_TYPES = tuple(np.dtype(name) for name in sorted(INTEGERS))
_TOKEN_CODES = {dtype: code for code, dtype in enumerate(_TOKEN_TYPES)}
_F2, _F4, _I2, _I8 = (np.dtype(name) for name in ("<f2", "<f4", "<i2", "<i8"))


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a shard is asked: queries float32 [B, Q], documents to leave out int64 [B] or None.

    `domains`: only their entries; none named: all.
    """

    queries: Float32Array
    k: int
    exclude_doc_ids: Int64Array | None
    exact: bool
    domains: tuple[str, ...] = ()


def pack_search(request: SearchRequest, travelling: QueryType) -> bytes:
    rows, width = request.queries.shape
    half = travelling == "float16"
    excluded = request.exclude_doc_ids
    header = _SEARCH.pack(
        _SEARCH_TAG, request.exact, excluded is not None, half, rows, width, request.k
    )
    parts = [header] if excluded is None else [header, _bytes(excluded, _I8)]
    if half:
        scaled_BQ, exponents_B = to_half(request.queries)
        parts += [_bytes(scaled_BQ, _F2), _bytes(exponents_B, _I2)]
    else:
        parts.append(_bytes(request.queries, _F4))
    return b"".join([*_domains(request.domains), *parts] if request.domains else parts)


def unpack_search(body: bytes) -> SearchRequest:
    """Whether numbers are finite, and k allowed, the shard checks. Raises BadMessage."""
    if len(body) < _SEARCH.size or not body.startswith(_SEARCH_TAG):
        if body.startswith(_DOMAINS_TAG) and len(body) >= _DOMAINS.size:
            return _of_domains(body)
        raise BadMessage(f"{len(body)} bytes are no search")
    _, exact, excludes, half, rows, width, k = _SEARCH.unpack_from(body)
    for at, flag in zip(range(4, 7), (exact, excludes, half), strict=True):
        if body[at] != flag:  # any byte but 0 reads as True
            raise BadMessage(f"byte {at} of a search is {body[at]}; allowed: 0, 1")
    number_bytes, tail_bytes = (2, 2 * rows) if half else (4, 0)
    _check_size(body, _SEARCH.size + 8 * rows * excludes + number_bytes * rows * width + tail_bytes)
    at = _SEARCH.size
    exclude = None
    if excludes:
        exclude = np.frombuffer(body, _I8, rows, at).copy()
        at += 8 * rows
    sent = np.frombuffer(body, _F2 if half else _F4, rows * width, at).reshape(rows, width)
    if half:
        queries = from_half(sent, np.frombuffer(body, _I2, rows, at + sent.nbytes))
    else:
        queries = sent.copy()
    return SearchRequest(queries=queries, k=k, exclude_doc_ids=exclude, exact=exact)


def _domains(names: Sequence[str]) -> list[bytes]:
    text = json.dumps(list(names)).encode()
    if len(text) > MAX_DOMAINS_BYTES:
        raise ValueError(
            f"the names of {len(names)} domains have {len(text)} bytes, {MAX_DOMAINS_BYTES} are "
            "allowed; name fewer"
        )
    return [_DOMAINS.pack(_DOMAINS_TAG, len(text)), text, bytes(-len(text) % ALIGNMENT)]


def _of_domains(body: bytes) -> SearchRequest:
    """Raises BadMessage."""
    _, length = _DOMAINS.unpack_from(body)
    at = _DOMAINS.size + length
    inner = at + -length % ALIGNMENT
    if length > MAX_DOMAINS_BYTES or inner > len(body):
        raise BadMessage(f"names of {length} bytes do not fit a body of {len(body)}")
    try:
        names = json.loads(body[_DOMAINS.size : at])
    except (ValueError, RecursionError) as error:
        raise BadMessage("the domains are not JSON") from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise BadMessage("domains are a list of names")
    request = body[inner:]
    if not request.startswith(_SEARCH_TAG):  # also: never nested
        raise BadMessage("behind its domains there is no search")
    return replace(unpack_search(request), domains=tuple(names))


def pack_hits(reply: ShardReply) -> bytes:
    tokens = reply.tokens
    rows, k, entry_tokens = tokens.shape
    header = _HITS.pack(
        _HITS_TAG,
        reply.exact,
        _TOKEN_CODES[tokens.dtype],
        rows,
        k,
        entry_tokens,
        reply.epoch,
        reply.encoder_step,
    )
    return b"".join(
        (
            header,
            _bytes(reply.ids, _I8),
            _bytes(reply.doc_ids, _I8),
            _bytes(reply.scores, _F4),
            bytes(-4 * rows * k % ALIGNMENT),
            _bytes(tokens, tokens.dtype),
        )
    )


def unpack_hits(body: bytes, shard: int, rows: int, k: int) -> ShardReply:
    """A reply to `rows` queries for `k` entries each, its arrays read-only views of `body`.

    Raises:
        BadMessage: it is not one, or not to this question.
    """
    if len(body) < _HITS.size or not body.startswith(_HITS_TAG):
        raise BadMessage(f"{len(body)} bytes are no hits")
    _, exact, code, *shape, epoch, encoder_step = _HITS.unpack_from(body)
    if shape[:2] != [rows, k]:
        raise BadMessage(f"hits of shape {shape[:2]} came; {[rows, k]} were asked for")
    if code >= len(_TOKEN_TYPES) or body[4] != exact:
        raise BadMessage(f"tokens of type {code}, or a flag of {body[4]}, are not of this protocol")
    hits, dtype = rows * k, _TOKEN_TYPES[code]
    tokens_at = _HITS.size + 20 * hits + -4 * hits % ALIGNMENT
    _check_size(body, tokens_at + hits * shape[2] * dtype.itemsize)
    ids, doc_ids = np.frombuffer(body, _I8, 2 * hits, _HITS.size).reshape(2, rows, k)
    scores = np.frombuffer(body, _F4, hits, _HITS.size + 16 * hits).reshape(rows, k)
    tokens = np.frombuffer(body, dtype, hits * shape[2], tokens_at).reshape(shape)
    return ShardReply(
        shard=shard,
        ids=ids,
        scores=scores,
        doc_ids=doc_ids,
        tokens=tokens,
        epoch=epoch,
        encoder_step=encoder_step,
        exact=exact,
    )


def _bytes(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> Any:
    """What `bytes.join` takes; arrays without numbers have no buffer that it would."""
    whole = np.ascontiguousarray(array, dtype=dtype)
    return whole.data if whole.size else b""


def _check_size(body: bytes, expected: int) -> None:
    if len(body) != expected:
        raise BadMessage(f"a body of {expected} bytes is declared, {len(body)} came")
