"""The parts of a search and of a step, each measured alone, for `pluglm simulate --service`.

One shard's search in one process and one thread; messages of a shard that computes nothing, in
another process; what the asker does with a reply; a refresh; a trainer's step beside a memory in
its own process. Nothing here runs the whole system: that is what `simulation_check.py` does.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import note
from served import Load, invented_store, key_encoder, other_weights, queries_like
from transport import WIDTH, Prepared

from memory_server.local import LocalMemory
from memory_server.replies import as_retrieved, combine_replies
from memory_server.wire.fan_out import SearchFanout
from memory_server.wire.frames import Kind, Preamble, proof_of_request
from memory_server.wire.search_client import Lanes
from memory_server.wire.search_messages import SearchRequest, pack_hits, pack_search, unpack_hits
from memory_server.wire.search_server import SearchServer

TOP_K, ENTRY_TOKENS = 5, 64
REPLIES = 4  # that are merged together


def times(
    call: Callable[[], object],
    *,
    at_least_s: float,
    most: int = 400,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of single calls, one after the other, after some that do not count."""
    for _ in range(3):
        call()
    measured: list[float] = []
    until = time.perf_counter() + at_least_s
    while len(measured) < most and (len(measured) < 10 or time.perf_counter() < until):
        began = clock()
        call()
        measured.append(clock() - began)
    return measured


def searches(
    args: argparse.Namespace,
    sizes: Sequence[int],
    batches: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """One shard's search, by entries and queries.

    By `time.process_time` it is what a core of its own would take, whatever else the machine does.
    """
    rows = []
    encoder, weights = key_encoder(args.hidden)
    for entries in sizes:
        with tempfile.TemporaryDirectory() as directory:
            store = invented_store(Path(directory) / "store", entries)
            memory = LocalMemory(store, encoder=encoder, weights=weights)
            for batch in batches:
                queries = queries_like(memory, batch, seed=batch)
                seconds = times(
                    partial(memory.search, queries, TOP_K), at_least_s=args.seconds, clock=clock
                )
                rows.append({"entries": entries, "batch": batch, "seconds": seconds})
                note(f"search of {entries:,} for {batch}: {1e3 * np.mean(seconds):.2f} ms")
            memory.close()
    return rows


def _serve_nothing(secret: bytes, batches: Sequence[int], pipe: Any) -> None:
    torch.set_num_threads(1)
    shard = Prepared(0, 1, batches, TOP_K, ENTRY_TOKENS)
    server = SearchServer(shard, secret=secret)
    pipe.send(server.endpoint)
    pipe.recv()
    server.close()


def messages(args: argparse.Namespace, batches: Sequence[int]) -> dict[str, Any]:
    """What travelling takes: `hop` one way, `reply` and `send_s` at the asker."""
    secret = secrets.token_bytes(32)
    mine, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve_nothing, args=(secret, batches, theirs))
    process.start()
    endpoint: str = mine.recv()
    fanout = SearchFanout([1], resolve_endpoint=lambda shard, replica: endpoint, secret=secret)
    send_s = _sending(endpoint, secret, batches[0])
    hops, replies = [], []
    for batch in batches:
        queries = torch.randn(batch, WIDTH)
        request = SearchRequest(queries=queries.numpy(), k=TOP_K, exclude_doc_ids=None, exact=False)
        packing = np.array(times(partial(pack_search, request, "float16"), at_least_s=0.2))
        merging = _merging(batch)
        whole = np.array(times(partial(fanout.search, queries, TOP_K), at_least_s=args.seconds))
        left = whole - np.median(packing) - send_s - np.median(merging)
        hops.append({"batch": batch, "seconds": np.maximum(0.0, left / 2).tolist()})
        replies.append({"batch": batch, "seconds": merging})
        note(f"one way of {batch}: {1e6 * np.median(hops[-1]['seconds']):.0f} us")
    fanout.close()
    mine.send("end")
    process.join()
    return {"hop": hops, "reply": replies, "send_s": send_s}


def _merging(batch: int) -> list[float]:
    """Seconds per reply of reading and merging some."""
    bodies = []
    for shard in range(REPLIES):
        prepared = Prepared(shard, REPLIES, [batch], TOP_K, ENTRY_TOKENS)
        bodies.append(pack_hits(prepared.search(np.empty((batch, 1)), TOP_K)))

    def merge() -> None:
        read = [unpack_hits(body, shard, batch, TOP_K) for shard, body in enumerate(bodies)]
        as_retrieved(combine_replies(read, TOP_K), device=torch.device("cpu"), missing_shards=())

    return [seconds / REPLIES for seconds in times(merge, at_least_s=0.3)]


def _sending(endpoint: str, secret: bytes, batch: int) -> float:
    """Seconds of handing one request to its socket."""
    request = SearchRequest(
        queries=np.zeros((batch, WIDTH), np.float32), k=TOP_K, exclude_doc_ids=None, exact=False
    )
    body, lanes = pack_search(request, "float16"), Lanes()
    with lanes.borrow(lambda: [endpoint]) as lane:

        def send() -> None:
            preamble = Preamble(
                kind=Kind.SEARCH,
                shard=0,
                number=1,
                epoch=None,
                timeout_s=1.0,
                wait_s=0.0,
                proof=proof_of_request(secret),
            )
            lane.send(endpoint, [preamble.pack(), body])

        measured = times(send, at_least_s=0.2, most=200)
    lanes.close()
    return float(np.median(measured))


def refresh(args: argparse.Namespace) -> dict[str, float]:
    """How fast one shard makes keys, and what that and searching cost each other."""
    encoder, weights = key_encoder(args.hidden)
    with tempfile.TemporaryDirectory() as directory:
        store = invented_store(Path(directory) / "store", args.refreshed)
        memory = LocalMemory(store, encoder=encoder, weights=weights)
        queries = queries_like(memory, 32)

        def staged(seed: int) -> float:
            began = time.perf_counter()
            epoch = memory.stage(encoder_step=seed, weights=other_weights(weights, seed=seed))
            memory.wait_sealed(epoch, 600.0)
            sealed = time.perf_counter()
            memory.activate(epoch)
            return sealed - began

        staged(1)
        alone, longer, slower = [], [], []
        for turn in range(args.refreshes):
            # Side by side, so that a busy machine changes both alike.
            alone.append(staged(2 * turn + 2))
            quiet = times(partial(memory.search, queries, TOP_K), at_least_s=args.seconds)
            with Load(memory, queries) as load:
                beside = staged(2 * turn + 3)
            if load.failures:
                raise load.failures[0]
            slower.append(float(np.median(load.seconds) / np.median(quiet)))
            longer.append((beside - alone[-1]) / sum(load.seconds))
        memory.close()
    return {
        # The fastest: keys are made at a low priority, so other processes take its time.
        "encode_entries_per_s": args.refreshed / min(alone),
        "refresh_slowdown": max(1.0, float(np.median(slower))),
        "encode_share": float(np.clip(1 - np.median(longer), 0.0, 1.0)),
    }
