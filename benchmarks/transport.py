"""One search of several shards that compute nothing: by sockets against plain Ray actor calls.

Each actor holds prepared replies (ids, scores, documents and tokens of the winners) and gives them
to both. Both merge what comes back. What is left is what travelling costs.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from served import local_ray
from torch import Tensor

from memory_server.api import Entry, Retrieved
from memory_server.replies import ShardReply, merge_replies
from memory_server.wire.fan_out import SearchFanout
from memory_server.wire.search_server import SearchServer

WIDTH = 128
INLINE_BYTES = 64 << 10  # a larger argument goes through the object store once for all actors


class Prepared:
    """A shard whose answers are there before they are asked for."""

    def __init__(
        self, shard: int, shards: int, batches: Sequence[int], k: int, tokens: int
    ) -> None:
        self.shard = shard
        random = np.random.default_rng(shard)
        self._replies = {}
        for rows in batches:
            scores = -np.sort(-random.random((rows, k)).astype(np.float32))
            ids = np.arange(rows * k, dtype=np.int64).reshape(rows, k) * shards + shard
            self._replies[rows] = ShardReply(
                shard=shard,
                ids=ids,
                scores=scores,
                doc_ids=ids // 3,
                tokens=random.integers(0, 30_000, (rows, k, tokens)).astype(np.uint16),
                epoch=1,
                encoder_step=0,
            )

    def search(
        self,
        queries_BQ: Any,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        exact: bool = False,
        domains: Any = None,
    ) -> ShardReply:
        return self._replies[len(queries_BQ)]

    def entries(
        self, ids: Sequence[int], *, epoch: int | None = None, wait_s: float = 0.0
    ) -> list[Entry]:
        return []


class Host:
    """The actor: asked by Ray, or at the socket that it serves."""

    def __init__(self, secret: bytes, *shard: Any) -> None:
        torch.set_num_threads(1)
        self._shard = Prepared(*shard)
        self._server = SearchServer(self._shard, secret=secret)

    def endpoint(self) -> str:
        return self._server.endpoint

    def search(self, queries_BQ: Any, k: int) -> ShardReply:
        return self._shard.search(queries_BQ, k)


def by_actors(hosts: Sequence[Any], queries: Tensor, k: int) -> Retrieved:
    """The plainest fan-out: one call to each actor, then all their replies."""
    payload: Any = queries.numpy()
    if payload.nbytes > INLINE_BYTES:
        payload = ray.put(payload)
    replies = ray.get([host.search.remote(payload, k) for host in hosts])
    return merge_replies(replies, k, device=queries.device)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=positive, default=2)
    parser.add_argument("--batches", type=positive, nargs="+", default=[32, 512])
    parser.add_argument("--top-k", type=positive, default=5)
    parser.add_argument("--entry-tokens", type=positive, default=64)
    parser.add_argument("--repeats", type=positive, default=200)
    args = parser.parse_args()
    facts = begin()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    secret = secrets.token_bytes(32)
    print(
        f"{args.shards} shards, Q={WIDTH}, K={args.top_k}, entries of {args.entry_tokens} tokens\n"
    )
    rows, figures = [], []
    with local_ray(args.shards):
        host = ray.remote(num_cpus=0)(Host)
        hosts = [
            host.remote(secret, n, args.shards, args.batches, args.top_k, args.entry_tokens)
            for n in range(args.shards)
        ]
        places = ray.get([h.endpoint.remote() for h in hosts])
        fanout = SearchFanout(
            [1] * args.shards, resolve_endpoint=lambda shard, _: str(places[shard]), secret=secret
        )
        for batch in args.batches:
            queries = torch.randn(batch, WIDTH)
            calls = {
                "sockets": partial(fanout.search, queries, args.top_k),
                "actors": partial(by_actors, hosts, queries, args.top_k),
            }
            same = torch.equal(calls["sockets"]().ids, calls["actors"]().ids)
            spent = turn_by_turn(
                {name: partial(seconds, call) for name, call in calls.items()},
                repeats=args.repeats,
                warmup=20,
            )
            ours, theirs = (Spread.of([1000 * s for s in spent[name]]) for name in calls)
            ratio = spread_of_ratios(spent["sockets"], spent["actors"])
            rows.append([str(batch), ours.shown(), theirs.shown(), ratio.shown()])
            figures.append(
                {
                    "batch": batch,
                    "sockets_ms": ours,
                    "actor_calls_ms": theirs,
                    "ratio": ratio,
                    "same_ids": same,
                }
            )
        fanout.close()
    print(table(["queries", "sockets, ms", "actor calls, ms", "ratio"], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
