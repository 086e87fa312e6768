"""FAISS presets of the memory against its exact flat search: time, recall, building, refreshing.

All search the same keys (a mixture of Gaussians, or --keys FILE) with the same queries, turn by
turn. How much a preset looks at is chosen by other queries, as a server does; recall is against
the exact answers. A refresh is simulated by keys that drifted a little: trained parts are kept, or
trained anew. faiss.IndexFlatIP stands beside as a second peer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
from served import queries_near
from torch import Tensor

from memory_server.index.approximate_index import ApproximateIndex
from memory_server.index.base import IndexInput, IndexSettings, RecentQueries
from memory_server.index.factory import build_index
from memory_server.index.recall_audit import recall_at_k
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes
from memory_server.keys.stored_vectors import StoredVectors

CLUSTERS, TEST_QUERIES, TUNING_QUERIES, TURNS = 1000, 512, 256, 4
LATER = ((TUNING_QUERIES, 4), (TEST_QUERIES, 5))  # lots of queries after a refresh


def clustered_keys(entries: int, width: int) -> Tensor:
    """Keys around random centres, as a trained encoder's are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, width, generator=generator)
    nearest = torch.randint(CLUSTERS, (entries,), generator=generator)
    return centres[nearest] + 0.5 * torch.randn(entries, width, generator=generator)


def real_keys(path: Path) -> Tensor:
    """Keys from a .npy file, or from a directory of stored vectors."""
    array = StoredVectors.open(path).keys_NQ if path.is_dir() else np.load(path)
    return torch.from_numpy(np.array(array, dtype=np.float32))


class Queries:
    """Real ones from a file, which are dealt out without repeating; else made from the keys."""

    def __init__(self, path: Path | None) -> None:
        self._real = None if path is None else torch.from_numpy(np.load(path)).float()
        if self._real is not None:
            shuffled = torch.randperm(len(self._real), generator=torch.Generator().manual_seed(6))
            self._real = self._real[shuffled]

    def of(self, keys: Tensor, count: int, at: int) -> Tensor:
        """The `at`-th lot of `count` queries: the same for the same numbers."""
        if self._real is None:
            return queries_near(keys, count, at)
        start = at * TEST_QUERIES
        if start + count > len(self._real):
            raise SystemExit(
                f"--queries holds {len(self._real)} queries, {start + count} are needed"
            )
        return self._real[start : start + count]


def rows_of(keys: Tensor) -> IndexInput:
    """Keys as one segment's block."""
    rows = len(keys)
    block = KeyBlock(
        codes=KeyCodes(keys),
        largest_norm=float(torch.linalg.vector_norm(keys, dim=1).max()),
        checksum=0,
        origin=("segment", 0, rows),
    )
    return IndexInput(
        keys=BlockedKeys([(block, 0, rows)], keys.shape[1], keys.device),
        ids_N=torch.arange(rows),
        doc_ids_N=torch.arange(rows) // 4,
        dead_rows=torch.empty(0, dtype=torch.int64),
    )


def built(
    kind: str, keys: Tensor, asked: Tensor, k: int, previous: ApproximateIndex | None = None
) -> tuple[ApproximateIndex, float]:
    """The index over these keys, its effort chosen by what was asked, and the seconds it took.

    The seconds are without the choice, which a server makes beside its searches.
    """
    began = time.perf_counter()
    index = build_index(IndexSettings(kind=kind), rows_of(keys), previous=previous)
    build_s = time.perf_counter() - began
    assert isinstance(index, ApproximateIndex)
    if not index.parts:
        raise SystemExit(f"{len(keys)} keys are too few for {kind}; give --entries 20000 or more")
    nothing = torch.full((len(asked),), -1, dtype=torch.int64)
    index.tune(RecentQueries(queries_nQ=asked, exclude_doc_ids_n=nothing, k=k))
    return index, build_s


def answers(search: Callable[..., Any], queries: Tensor, batch: int, k: int) -> Tensor:
    return torch.cat([search(few, k, None).rows for few in queries.split(batch)])


def measure(
    args: argparse.Namespace, kind: str, keys: Tensor, drifted: Tensor, asked: Queries
) -> dict[str, Any]:
    """All figures of one preset."""
    note(f"{kind}: building")
    k, batch = args.top_k, args.batch
    index, build_s = built(kind, keys, asked.of(keys, TUNING_QUERIES, 0), k)
    exactly = partial(index.search, exact=True)
    queries = asked.of(keys, TEST_QUERIES, 1)
    true_rows = answers(exactly, queries, batch, k)
    recall = recall_at_k(answers(index.search_approximately, queries, batch, k), true_rows)
    few = list(asked.of(keys, TURNS * batch, 2).split(batch))
    faiss_queries = [one.numpy() for one in few]

    def all_of(search: Callable[[Any], object], batches: list[Any]) -> Callable[[], float]:
        return partial(seconds, lambda: [search(one) for one in batches])

    calls = {
        "preset": all_of(lambda one: index.search_approximately(one, k, None), few),
        "flat": all_of(lambda one: exactly(one, k, None), few),
    }
    if args.flat_ip:
        flat_ip = faiss.IndexFlatIP(keys.shape[1])
        flat_ip.add(keys.numpy())
        calls["flat_ip"] = all_of(lambda one: flat_ip.search(one, k), faiss_queries)
    note(f"{kind}: searching")
    spent = turn_by_turn(calls, repeats=args.repeats)
    per_batch = {name: [1000 * s / len(few) for s in times] for name, times in spent.items()}
    note(f"{kind}: refreshing")
    tuning, later = (asked.of(drifted, count, at) for count, at in LATER)
    kept, kept_s = built(kind, drifted, tuning, k, index)
    if kept.parts[0].accelerator.trained_anew:
        note(f"{kind}: the keys drifted so far that trained parts were not kept")
    true_later = answers(partial(kept.search, exact=True), later, batch, k)
    kept_recall = recall_at_k(answers(kept.search_approximately, later, batch, k), true_later)
    drift = kept.parts[0].accelerator.drift
    del kept
    anew, anew_s = built(kind, drifted, tuning, k)
    anew_recall = recall_at_k(answers(anew.search_approximately, later, batch, k), true_later)
    strange = torch.randn(queries.shape, generator=torch.Generator().manual_seed(4))
    strange_recall = recall_at_k(
        answers(index.search_approximately, strange, batch, k),
        answers(exactly, strange, batch, k),
    )
    return {
        "index": kind,
        "factory": index.parts[0].recipe.factory,
        "search": index.describe(),
        "preset_ms": Spread.of(per_batch["preset"]),
        "flat_ms": Spread.of(per_batch["flat"]),
        "flat_ip_ms": Spread.of(per_batch["flat_ip"]) if args.flat_ip else None,
        "times_faster": spread_of_ratios(spent["flat"], spent["preset"]),
        "times_faster_than_flat_ip": spread_of_ratios(spent["flat_ip"], spent["preset"])
        if args.flat_ip
        else None,
        "recall": recall,
        "recall_of_strange_queries": strange_recall,
        "bytes_per_entry": index.parts[0].accelerator.bytes / len(keys),
        "build_s": build_s,
        "kept_s": kept_s,
        "kept_recall": kept_recall,
        "anew_s": anew_s,
        "anew_recall": anew_recall,
        "drift": drift,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=1_000_000)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument(
        "--keys",
        type=Path,
        help="of a trained model: [N, Q] as .npy, or vectors made by freeze_vectors",
    )
    parser.add_argument(
        "--queries", type=Path, help="that its searches ask: [n, Q] as .npy (trained_keys.py)"
    )
    parser.add_argument("--index", nargs="+", default=["ivf", "pq"], metavar="KIND")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--top-k", type=positive, default=5)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--no-flat-ip", dest="flat_ip", action="store_false")
    args = parser.parse_args()
    facts = begin()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    faiss.cvar.distance_compute_blas_threshold = 8  # the best for IndexFlatIP at batch 32
    keys = clustered_keys(args.entries, args.width) if args.keys is None else real_keys(args.keys)
    asked = Queries(args.queries)
    generator = torch.Generator().manual_seed(5)
    drifted = keys + 0.15 * keys[:4096].std() * torch.randn(keys.shape, generator=generator)
    print(
        f"N={len(keys):,}, Q={keys.shape[1]}, K={args.top_k}, batches of {args.batch}, "
        f"{args.threads} thread(s)\n"
    )
    figures = [measure(args, kind, keys, drifted, asked) for kind in args.index]
    print(table(SEARCH_HEADERS, [search_row(one) for one in figures]), end="\n\n")
    print(table(REFRESH_HEADERS, [refresh_row(one) for one in figures]))
    finish(args.json, facts, args, figures)


SEARCH_HEADERS = [
    "index",
    "ms per batch",
    "flat, ms",
    "times faster",
    "than IndexFlatIP",
    "recall",
    "of Gaussian queries",
    "B/entry",
]
REFRESH_HEADERS = [
    "index",
    "build, s",
    "refresh, s",
    "recall",
    "trained anew, s",
    "recall",
    "drift",
]


def search_row(one: dict[str, Any]) -> list[str]:
    than_flat_ip = one["times_faster_than_flat_ip"]
    return [
        f"{one['index']} ({one['factory']} {one['search']})",
        one["preset_ms"].shown(),
        one["flat_ms"].shown(1),
        one["times_faster"].shown(1),
        "" if than_flat_ip is None else than_flat_ip.shown(1),
        f"{one['recall']:.4f}",
        f"{one['recall_of_strange_queries']:.3f}",
        f"{one['bytes_per_entry']:.0f}",
    ]


def refresh_row(one: dict[str, Any]) -> list[str]:
    return [
        one["index"],
        f"{one['build_s']:.1f}",
        f"{one['kept_s']:.1f}",
        f"{one['kept_recall']:.4f}",
        f"{one['anew_s']:.1f}",
        f"{one['anew_recall']:.4f}",
        f"{one['drift']:.2f}",
    ]


if __name__ == "__main__":
    main()
