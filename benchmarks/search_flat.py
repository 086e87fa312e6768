"""Exact search through LocalMemory against faiss.IndexFlatIP at its best BLAS threshold.

Both search the same keys with the same queries, turn by turn; the answers are compared. Which of
several thresholds is faiss's best is tried first, for each batch.
LocalMemory also checks the request, masks, and gathers the winners' tokens; faiss only finds ids.
"""

from __future__ import annotations

import tempfile
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
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from invented import write_store
from numpy.typing import NDArray
from torch import Tensor

from memory_server.local import LocalMemory

THRESHOLDS, TRIALS = (1, 20, 512), 2
WIDTH, ENTRY_TOKENS, CLUSTERS, VOCABULARY = 128, 64, 1000, 60_000


def clustered_keys(entries: int) -> Tensor:
    """Keys around random centres, as a trained encoder's are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
    nearest = torch.randint(CLUSTERS, (entries,), generator=generator)
    return centres[nearest] + 0.5 * torch.randn(entries, WIDTH, generator=generator)


class RowEncoder:
    """The key of an entry is the row that its first two tokens spell."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def __call__(self, tokens_nS: Tensor) -> Tensor:
        return self._keys[tokens_nS[:, 0] * VOCABULARY + tokens_nS[:, 1]]


def best_threshold(index: Any, queries: NDArray[np.float32], top_k: int, defaults: int) -> int:
    """The BLAS threshold at which faiss answers these queries soonest."""
    spent = {}
    for threshold in sorted({*THRESHOLDS, defaults}):
        faiss.cvar.distance_compute_blas_threshold = threshold
        search = partial(index.search, queries, top_k)
        spent[threshold] = min(seconds(search) for _ in range(TRIALS))
    return min(spent, key=spent.__getitem__)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=1_000_000)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--top-k", type=positive, default=5)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 32, 512])
    args = parser.parse_args()
    facts = begin()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    default = faiss.cvar.distance_compute_blas_threshold
    keys = clustered_keys(args.entries)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(keys.numpy())
    tokens_NS = np.zeros((args.entries, ENTRY_TOKENS), dtype=np.uint16)
    tokens_NS[:, 0], tokens_NS[:, 1] = np.divmod(np.arange(args.entries), VOCABULARY)
    print(f"N={args.entries:,}, Q={WIDTH}, K={args.top_k}, {args.threads} thread(s)\n")
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as directory:
        store = write_store(Path(directory) / "store", tokens_NS, vocab_size=VOCABULARY)
        with LocalMemory(store, encoder=lambda _: RowEncoder(keys), weights={}) as memory:
            for batch in args.batches:
                chosen = torch.randint(args.entries, (batch,))
                queries = keys[chosen] + 0.3 * torch.randn(batch, WIDTH)
                threshold = best_threshold(index, queries.numpy(), args.top_k, default)
                faiss.cvar.distance_compute_blas_threshold = threshold
                search: dict[str, Callable[[], Any]] = {
                    "ours": partial(memory.search, queries, args.top_k),
                    "theirs": partial(index.search, queries.numpy(), args.top_k),
                }
                spent = turn_by_turn(
                    {name: partial(seconds, call) for name, call in search.items()},
                    repeats=args.repeats,
                )
                ours, theirs = (
                    Spread.of([1000 * s for s in spent[name]]) for name in ("ours", "theirs")
                )
                ratio = spread_of_ratios(spent["ours"], spent["theirs"])
                same = float((search["ours"]().ids.numpy() == search["theirs"]()[1]).mean())
                shown = [ours.shown(), theirs.shown(), str(threshold), ratio.shown()]
                rows.append([str(batch), *shown, f"{same:.4f}"])
                figures.append(
                    {
                        "batch": batch,
                        "local_memory_ms": ours,
                        "index_flat_ip_ms": theirs,
                        "blas_threshold": threshold,
                        "ratio": ratio,
                        "same_ids": same,
                    }
                )
    headers = ["queries", "LocalMemory, ms", "IndexFlatIP, ms", "its threshold", "ratio"]
    print(table([*headers, "same ids"], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
