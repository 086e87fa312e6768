"""Keys held as int8, float16 or bfloat16: bytes, recall and time against exact float32 search.

One LocalMemory per kind, over the same entries; their searches take turns. Candidates are scored by
exact keys, which the shard makes again from their tokens; here that is looking a row up, so the
time is that of the search alone, and the rows asked for tell what an encoder would add.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

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
from search_flat import ENTRY_TOKENS, VOCABULARY, WIDTH, RowEncoder, clustered_keys
from torch import Tensor

from memory_server.api import Retrieved
from memory_server.index.base import IndexSettings
from memory_server.keys.key_codes import KEY_DTYPES
from memory_server.local import LocalMemory


class CountingEncoder(RowEncoder):
    """Counts the keys that it makes."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__(keys)
        self.made = 0

    def __call__(self, tokens_nS: Tensor) -> Tensor:
        self.made += len(tokens_nS)
        return super().__call__(tokens_nS)


def recall(found: Retrieved, exact: Retrieved) -> float:
    """The share of the exact winners that were found."""
    return float((found.ids.unsqueeze(2) == exact.ids.unsqueeze(1)).any(1).double().mean())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=1_000_000)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--top-k", type=positive, default=5)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--batches", type=positive, nargs="+", default=[32, 512])
    parser.add_argument(
        "--dtypes", nargs="+", choices=KEY_DTYPES[1:], default=["int8"], help="beside float32"
    )
    args = parser.parse_args()
    facts = begin()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keys = clustered_keys(args.entries)
    tokens_NS = np.zeros((args.entries, ENTRY_TOKENS), dtype=np.uint16)
    tokens_NS[:, 0], tokens_NS[:, 1] = np.divmod(np.arange(args.entries), VOCABULARY)
    print(f"N={args.entries:,}, Q={WIDTH}, K={args.top_k}, {args.threads} thread(s)\n")
    rows, figures = [], []
    names = ["float32", *args.dtypes]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        store = write_store(Path(directory) / "store", tokens_NS, vocab_size=VOCABULARY)
        encoders = {name: CountingEncoder(keys) for name in names}
        memories = {
            name: opened.enter_context(
                LocalMemory(
                    store,
                    encoder=lambda _, encoder=encoder: encoder,
                    weights={},
                    index=IndexSettings(key_dtype=name),
                )
            )
            for name, encoder in encoders.items()
        }
        for kind in ("clustered", "Gaussian"):
            for batch in args.batches:
                queries = torch.randn(batch, WIDTH)
                if kind == "clustered":
                    queries = keys[torch.randint(args.entries, (batch,))] + 0.3 * queries
                calls = {
                    name: partial(memory.search, queries, args.top_k)
                    for name, memory in memories.items()
                }
                spent = turn_by_turn(
                    {name: partial(seconds, call) for name, call in calls.items()},
                    repeats=args.repeats,
                )
                exact = calls["float32"]()
                for name in args.dtypes:
                    before = encoders[name].made
                    found = calls[name]()
                    figure = {
                        "dtype": name,
                        "queries": kind,
                        "batch": batch,
                        "key_bytes_per_entry": memories[name].info().bytes["keys"] / args.entries,
                        "recall": recall(found, exact),
                        "certified": found.exact,
                        "exact_keys_per_query": (encoders[name].made - before) / batch,
                        "ms": Spread.of([1000 * s for s in spent[name]]),
                        "float32_ms": Spread.of([1000 * s for s in spent["float32"]]),
                        "ratio": spread_of_ratios(spent[name], spent["float32"]),
                    }
                    figures.append(figure)
                    rows.append(
                        [
                            f"{name}, {batch} {kind}",
                            f"{figure['key_bytes_per_entry']:.1f}",
                            f"{figure['recall']:.4f}",
                            "yes" if found.exact else "no",
                            f"{figure['exact_keys_per_query']:.1f}",
                            figure["ms"].shown(),
                            figure["ratio"].shown(),
                        ]
                    )
    headers = ["keys and queries", "bytes/entry", f"recall@{args.top_k}", "certified"]
    print(table([*headers, "exact keys/query", "ms", "ratio to float32"], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
