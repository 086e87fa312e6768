"""Exact and approximate search of one set of keys: torch, FAISS's kinds, and the memory's own.

Keys lie around a thousand random centres; queries are keys with noise. Each approximate peer looks
at the least that finds --recall of the true five for other queries of the same kind, which is how
the memory chooses for itself; one that cannot is told with what it finds at most. All search the
same batch turn by turn, so that ratios hold on a busy machine; `faiss.IndexFlatIP` is the peer of
every ratio. "Ours" is the memory in this process, and over Ray two shard actors of one thread each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    note,
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from served import (
    SEGMENT_ROWS,
    ClusteredEncoder,
    clustered_weights,
    invented_store,
    invented_tokens,
    local_ray,
    queries_near,
)
from torch import Tensor

from memory_server.actors.client import RayMemory
from memory_server.api import Memory
from memory_server.index.base import IndexSettings
from memory_server.index.recall_audit import recall_at_k
from memory_server.local import LocalMemory

PEER = "faiss.IndexFlatIP"
K, TUNING_QUERIES, TEST_QUERIES = 5, 256, 512
LOTS = 32  # queries of one search while an index is tuned
_ROWS = 1 << 15  # whose keys are made at once
_CANDIDATES = 20  # per wanted entry, which codes propose and exact keys score


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """One way of searching. `search` maps queries [B, Q] to rows, int64 [B, K]."""

    name: str
    search: Callable[[Tensor], Tensor]
    build_s: float
    bytes_per_entry: float
    looked_at: str = "all"


def torch_search(keys: Tensor) -> Searcher:
    return Searcher(
        name="torch product and topk",
        search=lambda queries: torch.topk(queries @ keys.T, K, dim=1).indices,
        build_s=0.0,
        bytes_per_entry=4 * keys.shape[1],
    )


def faiss_kinds(rows: int) -> Mapping[str, tuple[str, str, list[int]]]:
    """By name: factory string, the parameter that is tuned, and its values from the least."""
    lists = 2 ** round(np.log2(4 * np.sqrt(rows)))
    probes = [2**power for power in range(int(np.log2(lists)) + 1)]
    efforts = [16, 32, 64, 128, 256, 512, 1024]
    return {
        PEER: ("Flat", "", []),
        "FAISS IVF": (f"IVF{lists},Flat", "nprobe", probes),
        "FAISS IVF, 8 bits": (f"IVF{lists},SQ8", "nprobe", probes),
        "FAISS IVF, PQ, refined": (f"IVF{lists},PQ64x4fs,RFlat", "nprobe", probes),
        "FAISS IVF, RaBitQ, refined": (f"IVF{lists},RaBitQ,RFlat", "nprobe", probes),
        "FAISS HNSW": ("HNSW32", "efSearch", efforts),
    }


def faiss_search(
    name: str, keys: Tensor, tuning: Tensor, true_rows: Tensor, wanted: float
) -> Searcher:
    """Build one of FAISS's kinds, and let it look at the least that finds `wanted`."""
    factory, parameter, values = faiss_kinds(len(keys))[name]
    index = faiss.index_factory(keys.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    array = keys.numpy()
    began = time.perf_counter()
    if not index.is_trained:
        index.train(array[:: max(1, len(array) // 100_000)])
    index.add(array)
    build_s = time.perf_counter() - began

    def search(queries: Tensor) -> Tensor:
        return torch.from_numpy(index.search(queries.numpy(), K)[1])

    size = len(faiss.serialize_index(index)) / len(keys)
    refined = isinstance(index, faiss.IndexRefine)
    if refined:
        index.k_factor = _CANDIDATES
    space, looked_at = faiss.ParameterSpace(), "all"
    for value in values:
        base = faiss.downcast_index(index.base_index) if refined else index
        space.set_index_parameter(base, parameter, value)
        looked_at = f"{parameter}={value}"
        if recall_at_k(search(tuning), true_rows) >= wanted:
            break
    return Searcher(
        name=name, search=search, build_s=build_s, bytes_per_entry=size, looked_at=looked_at
    )


def memory_search(name: str, memory: Memory, build_s: float, tuning: Tensor) -> Searcher:
    """A memory that has seen the queries by which an approximate index decides."""
    for few in tuning.split(LOTS):
        memory.search(few, K)
    looked_at = "all"
    if isinstance(memory, LocalMemory):
        report = memory.audit()
        looked_at = "all" if report.exact else report.reason.rpartition("(")[2].rstrip(")")
    info = memory.info()
    return Searcher(
        name=name,
        search=lambda queries: memory.search(queries, K).ids,
        build_s=build_s,
        # Tokens are mapped from the store, and not the index's.
        bytes_per_entry=sum(size for part, size in info.bytes.items() if part != "tokens")
        / info.entries,
        looked_at=looked_at,
    )


@contextmanager
def memories(
    store: Path, weights: Mapping[str, Tensor], kinds: Mapping[str, IndexSettings], tuning: Tensor
) -> Iterator[list[Searcher]]:
    """The memory in this process with each index, and two actors with the exact one."""
    made: list[Memory] = []
    found = []
    try:
        for name, settings in kinds.items():
            note(f"{name} ...")
            began = time.perf_counter()
            local = LocalMemory(store, encoder=ClusteredEncoder, weights=weights, index=settings)
            took = time.perf_counter() - began
            made.append(local)
            found.append(memory_search(name, local, took, tuning))
        note("over Ray ...")
        began = time.perf_counter()
        served = RayMemory.start(
            store,
            shards=2,
            encoder=ClusteredEncoder,
            weights=weights,
            name="peers",
            threads_per_shard=1,
        )
        took = time.perf_counter() - began
        made.append(served)
        found.append(memory_search("ours, exact, over Ray", served, took, tuning))
        yield found
    finally:
        for memory in made:
            memory.close()


def measured(
    searchers: list[Searcher], asked: Tensor, true_rows: Tensor, args: Any
) -> list[dict[str, Any]]:
    """Recall of each, and milliseconds by batch, turn by turn."""
    figures: list[dict[str, Any]] = [
        {
            "name": one.name,
            "looked_at": one.looked_at,
            "build_s": one.build_s,
            "bytes_per_entry": one.bytes_per_entry,
            "recall": recall_at_k(
                torch.cat([one.search(few) for few in asked.split(LOTS)]), true_rows
            ),
            "ms": {},
            "ratio": {},
        }
        for one in searchers
    ]
    for batch in args.batches:
        note(f"batch {batch} ...")
        few = asked[:batch].contiguous()
        times = turn_by_turn(
            {one.name: partial(seconds, partial(one.search, few)) for one in searchers},
            repeats=args.repeats,
        )
        for figure in figures:
            own = times[figure["name"]]
            figure["ms"][str(batch)] = Spread.of([1e3 * s for s in own])
            figure["ratio"][str(batch)] = spread_of_ratios(own, times[PEER])
    return figures


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=500_000)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 32])
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    if not max(args.batches) <= TEST_QUERIES or not 0 < args.recall <= 1:
        parser.error(f"--batches are at most {TEST_QUERIES}, --recall is above 0 and at most 1")
    facts = begin()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    weights = clustered_weights()
    with tempfile.TemporaryDirectory() as directory, local_ray(3):
        store = invented_store(Path(directory) / "store", args.entries)
        keys = all_keys(weights, args.entries)
        tuning, asked = (queries_near(keys, count, seed) for seed, count in
                         enumerate((TUNING_QUERIES, TEST_QUERIES)))  # fmt: skip
        exact = torch_search(keys)
        true_tuning, true_asked = exact.search(tuning), exact.search(asked)
        searchers = [exact]
        for name in faiss_kinds(args.entries):
            note(f"{name} ...")
            searchers.append(faiss_search(name, keys, tuning, true_tuning, args.recall))
        kinds = {
            "ours, exact": IndexSettings(),
            "ours, exact, int8 keys": IndexSettings(key_dtype="int8"),
            "ours, ivf": IndexSettings(kind="ivf", min_recall=args.recall),
            "ours, pq": IndexSettings(kind="pq", min_recall=args.recall),
        }
        with memories(store.path, weights, kinds, tuning) as own:
            figures = measured([*searchers, *own], asked, true_asked, args)
    print(
        f"N={args.entries:,}, Q={keys.shape[1]}, K={K}, {args.threads} threads; ratios against "
        f"{PEER}, medians (range)\n"
    )
    headers = ["", "looks at", "recall", "B/entry", "build s"]
    for batch in args.batches:
        headers += [f"ms at {batch}", "ratio"]
    rows = [
        [
            figure["name"],
            figure["looked_at"],
            f"{figure['recall']:.3f}",
            f"{figure['bytes_per_entry']:.0f}",
            f"{figure['build_s']:.1f}",
            *(
                cell
                for batch in map(str, args.batches)
                for cell in (figure["ms"][batch].shown(1), f"{figure['ratio'][batch].median:.3f}")
            ),
        ]
        for figure in figures
    ]
    print(table(headers, rows))
    finish(args.json, facts, args, figures)


def all_keys(weights: Mapping[str, Tensor], entries: int) -> Tensor:
    """The keys of an invented store's entries in the order of their ids, float32 [N, Q]."""
    encoder = ClusteredEncoder(weights)
    parts = []
    for first in range(0, entries, SEGMENT_ROWS):
        tokens = invented_tokens(min(SEGMENT_ROWS, entries - first), seed=first)
        parts += [
            encoder(torch.from_numpy(tokens[row : row + _ROWS].astype(np.int64)))
            for row in range(0, len(tokens), _ROWS)
        ]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
