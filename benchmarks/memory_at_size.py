"""What a memory costs by its size: to build, load, refresh, edit, search, and to come back to.

Each size runs in a process of its own, in one process without Ray: what a shard does. "resume" is
a new process that opens the store and serves it again. Bytes are the process's own (USS): the
mapped tokens are the page cache's. Queries are keys with noise of about a quarter of their
deviation. An approximate index has seen some of them, and chosen how much it looks at, before it is
timed; with `--min-recall 0` it answers whatever it finds, and how much that is stands beside. A
refresh holds two epochs: where one fills the machine, `--steps search` measures that one alone.
`cost_curves.py` makes laws of what --json writes.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from harness import (
    argument_parser,
    begin,
    finish,
    in_fresh_process,
    note,
    peak_resident_bytes,
    positive,
    seconds,
    table,
)
from served import (
    SEGMENT_ROWS,
    invented_segment,
    invented_store,
    invented_tokens,
    key_encoder,
    other_weights,
    queries_near,
)
from torch import Tensor

from memory_server.index.base import IndexSettings
from memory_server.index.factory import check_index
from memory_server.keys.key_codes import KEY_DTYPES
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from memory_server.switch import show_content

ASKED_BEFORE = 512
KEYS_ASKED_FOR = 4096
STEPS = ("search", "refresh", "edit", "resume")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one size; None: not measured. `bytes_per_entry` is by part, `own_bytes` of the process
    with one epoch live, `recall` of an approximate index on its own queries."""

    entries: int
    build_s: float
    load_s: float
    refresh_s: float | None
    add_s: float | None
    remove_s: float | None
    swap_s: float | None
    resume_s: float | None
    search_ms: dict[int, float]
    recall: float | None
    bytes_per_entry: dict[str, float]
    own_bytes: int
    peak_bytes: int
    store_bytes: int


def build(path: Path, entries: int, topics: int) -> float:
    """Seconds to write and commit the entries."""
    took = seconds(partial(invented_store, path, entries, topics=topics))
    os.sync()  # unwritten pages of the file cache would not count as free memory
    return took


def first_keys(entries: int, topics: int, encoder: Callable[[Tensor], Tensor]) -> Tensor:
    """Keys of some of the store's first entries, float32 [n, Q]."""
    tokens = invented_tokens(min(SEGMENT_ROWS, entries), seed=0, topics=topics)
    chosen = np.random.default_rng(1).integers(0, len(tokens), KEYS_ASKED_FOR)
    with torch.no_grad():
        return encoder(torch.from_numpy(tokens[chosen].astype(np.int64)))


def serve(path: Path, settings: IndexSettings, args: argparse.Namespace) -> dict[str, Any]:
    """Load and search, and what of refresh and edit is asked for: in the process that is asked."""
    batches, steps = args.batches, args.steps
    torch.set_num_threads(torch.get_num_threads())
    encoder, weights = key_encoder(args.hidden)
    store = Store.open(path)
    entries = store.manifest().entries
    began = time.perf_counter()
    memory = LocalMemory(store, encoder=encoder, weights=weights, index=settings)
    load_s = time.perf_counter() - began
    info = memory.info()
    keys = first_keys(entries, args.topics, encoder(weights))
    asked = queries_near(keys, max(ASKED_BEFORE, *batches), seed=2)
    for few in asked[:ASKED_BEFORE].split(32):  # the audit remembers some of each search
        memory.search(few, 5)
    audited = memory.audit()
    note(f"{entries:,} entries loaded in {load_s:.1f} s; {audited.reason}")
    gc.collect()
    own_bytes = psutil.Process().memory_full_info().uss
    search_ms = {}
    for batch in batches:
        queries = asked[-batch:]
        memory.search(queries, 5)
        times = [seconds(partial(memory.search, queries, 5)) for _ in range(5)]
        search_ms[batch] = 1e3 * float(np.median(times))

    def refresh() -> None:
        before = memory.info().epoch
        epoch = memory.stage(encoder_step=1, weights=other_weights(weights, seed=1))
        memory.wait_sealed(epoch, 24 * 3600)
        memory.activate(epoch)
        memory.release(before)

    def add() -> None:
        new = invented_segment(store, "add", 10 * entries, 1000)
        show_content(memory, store.commit(add_segments=[new], message="add", domain="added"))

    def remove() -> None:
        show_content(memory, store.commit(remove_ids=[entries // 2], message="remove"))

    def swap() -> None:
        new = invented_segment(store, "swap", 11 * entries, 1000)
        version = store.commit(
            add_segments=[new], domain="other", remove_domains=["added"], message="swap"
        )
        show_content(memory, version)

    costs: dict[str, float | None] = dict.fromkeys(("refresh_s", "add_s", "remove_s", "swap_s"))
    if "refresh" in steps:
        costs["refresh_s"] = seconds(refresh)
    if "edit" in steps:
        costs |= {"add_s": seconds(add), "remove_s": seconds(remove), "swap_s": seconds(swap)}
    memory.close()
    return {
        **costs,
        "entries": entries,
        "load_s": load_s,
        "search_ms": search_ms,
        "recall": None if settings.kind == "flat" else audited.recall,
        "bytes_per_entry": {part: size / entries for part, size in info.bytes.items()},
        "own_bytes": own_bytes,
        "peak_bytes": peak_resident_bytes(),
        "store_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
    }


def resume(path: Path, settings: IndexSettings, hidden: int) -> float:
    """Seconds until a new process answers from what the last one left."""
    encoder, weights = key_encoder(hidden)
    began = time.perf_counter()
    with LocalMemory(path, encoder=encoder, weights=weights, index=settings) as memory:
        memory.search(torch.ones(1, memory.info().key_width), 1)
        return time.perf_counter() - began


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--entries", type=positive, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--hidden", type=positive, default=256, help="of the key encoder")
    parser.add_argument(
        "--topics", type=positive, default=0, help="so many clusters of entries (default: none)"
    )
    parser.add_argument("--index", default="flat")
    parser.add_argument("--key-dtype", choices=KEY_DTYPES, default="float32")
    parser.add_argument("--min-recall", type=float, default=0.95, metavar="SHARE")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 32, 512])
    parser.add_argument("--directory", type=Path, help="for the stores; by default a temporary one")
    args = parser.parse_args()
    try:  # before a store is built, which takes minutes
        settings = IndexSettings(
            kind=args.index, key_dtype=args.key_dtype, min_recall=args.min_recall
        )
        check_index(settings)
    except ValueError as error:
        parser.error(str(error))
    facts = begin()
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for entries in args.entries:
            path = Path(directory) / f"store-{entries}"
            build_s = in_fresh_process(build, path, entries, args.topics)
            served = in_fresh_process(serve, path, settings, args)
            resume_s = None
            if "resume" in args.steps:
                resume_s = in_fresh_process(resume, path, settings, args.hidden)
            costs.append(Cost(build_s=build_s, resume_s=resume_s, **served))
            note(str(costs[-1]))
            shutil.rmtree(path)
    print(f"{settings.describe()}, key encoder of H={args.hidden}, 64 tokens, K=5\n")
    parts = list(costs[0].bytes_per_entry)
    headers = ["entries", "build s", "load s", "refresh s", "add s", "remove s", "swap s",
               "resume s", *(f"ms at {b}" for b in args.batches),
               "recall", *(f"{part} B" for part in parts), "own GiB", "peak GiB"]  # fmt: skip
    rows = [
        [
            f"{c.entries:,}",
            *(
                "-" if s is None else f"{s:.2f}"
                for s in (
                    c.build_s,
                    c.load_s,
                    c.refresh_s,
                    c.add_s,
                    c.remove_s,
                    c.swap_s,
                    c.resume_s,
                )
            ),
            *(f"{c.search_ms[b]:.1f}" for b in args.batches),
            "exact" if c.recall is None else f"{c.recall:.3f}",
            *(f"{c.bytes_per_entry[part]:.0f}" for part in parts),
            f"{c.own_bytes / 2**30:.2f}",
            f"{c.peak_bytes / 2**30:.2f}",
        ]
        for c in costs
    ]
    print(table(headers, rows))
    finish(args.json, facts, args, costs)


if __name__ == "__main__":
    main()
