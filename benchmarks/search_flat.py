"""Exact search through `LocalMemory` against `faiss.IndexFlatIP` at its best BLAS threshold.

    python benchmarks/search_flat.py [--entries 100000] [--threads 1]

Both search the same keys with the same queries, turn by turn; the answers are compared.
`LocalMemory` also checks the request, masks and gathers the winners' tokens; faiss only finds ids.
Prints medians and their ratio.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

from memory_server.local import LocalMemory
from memory_server.segments import write_segment
from memory_server.store import Store

WIDTH, ENTRY_TOKENS, CLUSTERS = 128, 64, 1000


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
        return self._keys[tokens_nS[:, 0] * 60_000 + tokens_nS[:, 1]]


def make_store(path: Path, entries: int) -> Store:
    store = Store.create(
        path,
        tokenizer_fingerprint="none",
        entry_tokens=ENTRY_TOKENS,
        vocab_size=60_000,
        pad_token_id=0,
    )
    rows = np.arange(entries)
    tokens = np.zeros((entries, ENTRY_TOKENS), dtype=np.uint16)
    tokens[:, 0], tokens[:, 1] = np.divmod(rows, 60_000)
    empty = [""] * entries
    write_segment(
        store.incoming / "all.arrow",
        ids=rows,
        doc_ids=rows // 4,
        tokens_NS=tokens,
        texts=empty,
        titles=empty,
        sources=empty,
        meta=store.meta,
    )
    store.commit(add_segments=[store.incoming / "all.arrow"], message="benchmark")
    return store


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 512])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    faiss.cvar.distance_compute_blas_threshold = 512  # the best for IndexFlatIP at these batches
    keys = clustered_keys(args.entries)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(keys.numpy())
    print(
        f"{platform.node()} {platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, faiss {faiss.__version__}, N={args.entries}, Q={WIDTH}, "
        f"K={args.top_k}"
    )
    with tempfile.TemporaryDirectory() as directory:
        store = make_store(Path(directory) / "store", args.entries)
        with LocalMemory(store, encoder=lambda _: RowEncoder(keys), weights={}) as memory:
            for batch in args.batches:
                chosen = torch.randint(args.entries, (batch,))
                queries = keys[chosen] + 0.3 * torch.randn(batch, WIDTH)
                ours, theirs = [], []
                for _ in range(args.repeats):
                    ours.append(seconds(partial(memory.search, queries, args.top_k)))
                    theirs.append(seconds(partial(index.search, queries.numpy(), args.top_k)))
                same = (
                    memory.search(queries, args.top_k).ids.numpy()
                    == index.search(queries.numpy(), args.top_k)[1]
                ).mean()
                a, b = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
                print(
                    f"batch {batch:4d}: LocalMemory {a:8.1f} ms, IndexFlatIP {b:8.1f} ms, "
                    f"ratio {a / b:.2f}, same ids {same:.4f}"
                )


if __name__ == "__main__":
    main()
