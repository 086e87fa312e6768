"""Several searches that wait at a shard become one, and its reply several again. Pure functions."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from memory_server.replies import ShardReply
from memory_server.wire.frames import Preamble
from memory_server.wire.queries import Float32Array
from memory_server.wire.search_messages import Int64Array, SearchRequest

# Searches are joined at the largest k of all: one that asks for a thousand entries must not make
# a trainer's 512 queries gather a thousand each.
WIDEST_JOIN = 4
NOTHING_EXCLUDED = -1


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A search in a shard's queue; times are of `time.monotonic`.

    Attributes:
        sender: whom to answer at the socket; or `future`, if it came another way.
    """

    sender: bytes = field(repr=False)
    preamble: Preamble
    request: SearchRequest
    arrived: float
    deadline: float
    patient_until: float
    future: "Future[ShardReply] | None" = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return len(self.request.queries)


def take_joinable(queue: deque[Waiting], max_rows: int) -> list[Waiting]:
    """Remove the first search, and with it all that it may be answered together with.

    They name the same epoch (or none: the live one, which is then looked up once for all), exact
    or not, the same domains, the same width, and a similar k; together they have at most `max_rows`
    queries, or are one. The others keep their order.
    """
    first = queue.popleft()
    taken, rows, smallest, largest = [first], first.rows, first.request.k, first.request.k
    kept: list[Waiting] = []
    while queue:
        other = queue.popleft()
        k = other.request.k
        fits = rows + other.rows <= max_rows
        similar = max(largest, k) <= WIDEST_JOIN * min(smallest, k)
        if fits and similar and _what(other) == _what(first):
            taken.append(other)
            rows, smallest, largest = rows + other.rows, min(smallest, k), max(largest, k)
        else:
            kept.append(other)
    queue.extend(kept)
    return taken


def _what(waiting: Waiting) -> tuple[int | None, bool, int, tuple[str, ...]]:
    request = waiting.request
    return waiting.preamble.epoch, request.exact, request.queries.shape[1], request.domains


def joined(requests: Sequence[SearchRequest]) -> tuple[Float32Array, int, Int64Array | None]:
    """(queries of all below each other, the largest k, documents to leave out, -1 where none)."""
    if len(requests) == 1:
        return requests[0].queries, requests[0].k, requests[0].exclude_doc_ids
    queries = np.concatenate([request.queries for request in requests])
    k = max(request.k for request in requests)
    if all(request.exclude_doc_ids is None for request in requests):
        return queries, k, None
    excluded = [
        np.full(len(request.queries), NOTHING_EXCLUDED, dtype=np.int64)
        if request.exclude_doc_ids is None
        else request.exclude_doc_ids
        for request in requests
    ]
    return queries, k, np.concatenate(excluded)


def split_again(reply: ShardReply, requests: Sequence[SearchRequest]) -> list[ShardReply]:
    """Each request's rows of the common reply, and its first k: hits come best first."""
    if len(requests) == 1:
        return [reply]
    replies, start = [], 0
    for request in requests:
        rows = slice(start, start + len(request.queries))
        replies.append(
            replace(
                reply,
                ids=reply.ids[rows, : request.k],
                scores=reply.scores[rows, : request.k],
                doc_ids=reply.doc_ids[rows, : request.k],
                tokens=reply.tokens[rows, : request.k],
            )
        )
        start = rows.stop
    return replies
