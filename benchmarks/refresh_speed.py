"""Keys of a whole memory by tables of the weights, against encoding entry by entry.

Both make the same keys from the same weights with the same module's parameters. Entry by entry is
measured on a sample at several batch sizes, and the best of them extrapolated to all entries. By
tables means building the tables anew and then reading them for every entry, both measured.
Tokens are as frequent as words are (Zipf), in no order of their ids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    note,
    positive,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from torch import Tensor

from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM, entry_encoder
from model.key_tables import KeyTables

SIZES = ["1000000x768", "200000x256"]
BATCHES = [16, 32, 48, 96, 256, 1024]


@dataclass(frozen=True)
class World:
    """What is encoded: weights, all tokens [N,S], and the sample [n,S] of them."""

    config: PlugLMConfig
    weights: dict[str, Tensor]
    tokens_NS: Tensor
    sample_nS: Tensor


def make_world(size: str, args: Any) -> World:
    """Weights as at the start of training, but with an attention that prefers some tokens."""
    entries, hidden = map(int, size.split("x"))
    config = PlugLMConfig(
        vocab_size=args.vocabulary,
        hidden_size=hidden,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=hidden,
        max_position_embeddings=max(512, args.tokens),
    )
    weights = PlugLMForMaskedLM(config).key_weights()
    for name, weight in weights.items():
        if "att_fc" in name:
            weight *= 10
    tokens_NS = torch.from_numpy(zipf_tokens(entries, args.tokens, args.vocabulary))
    return World(config, weights, tokens_NS, tokens_NS[: args.sample])


def zipf_tokens(entries: int, length: int, vocabulary: int) -> np.ndarray[Any, Any]:
    """int32 [entries, length], ids from 1 on, the r-th most frequent one 1/r as often."""
    rng = np.random.default_rng(0)
    ids = 1 + rng.permutation(vocabulary - 1).astype(np.int32)
    shares = np.cumsum(1 / np.arange(1, vocabulary))
    tokens = np.empty((entries, length), dtype=np.int32)
    for start in range(0, entries, 10_000):
        block = tokens[start : start + 10_000]
        block[:] = ids[np.searchsorted(shares, rng.random(block.shape) * shares[-1])]
    return tokens


def direct(encoder: Any, world: World, batch: int) -> float:
    """Seconds per entry."""
    entry_encoder.DIRECT_ROWS = batch
    began = time.perf_counter()
    encoder(world.sample_nS)
    return (time.perf_counter() - began) / len(world.sample_nS)


def by_tables(factory: KeyEncoderFactory, world: World) -> tuple[float, float]:
    """Seconds to build, and seconds to read, all counted."""
    began = time.perf_counter()
    tables = factory.tables(world.weights, entry_tokens=world.tokens_NS.shape[1])
    assert tables is not None
    encoder = factory.from_tables(tables)
    built = time.perf_counter()
    encoder(world.tokens_NS)
    return built - began, time.perf_counter() - built


def measured(size: str, args: Any) -> dict[str, Any]:
    note(f"{size}: making weights and tokens")
    world = make_world(size, args)
    entries = len(world.tokens_NS)
    factory = KeyEncoderFactory(world.config.to_dict())
    encoder = factory(world.weights)
    note(f"{size}: measuring")
    calls: dict[str, Any] = {
        str(batch): partial(direct, encoder, world, batch) for batch in args.batches
    }
    calls["tables"] = partial(by_tables, factory, world)
    spent = turn_by_turn(calls, repeats=args.repeats)
    turns = spent.pop("tables")
    singly = {batch: Spread.of(each) for batch, each in spent.items()}
    best = min(singly, key=lambda batch: singly[batch].median)
    tables = KeyTables.of_weights(
        world.weights, world.config, entry_tokens=world.tokens_NS.shape[1]
    )
    difference = (tables(world.sample_nS) - encoder(world.sample_nS)).abs().max()
    whole = [entries * each for each in spent[best]]
    return {
        "entries": entries,
        "hidden": world.config.hidden_size,
        "best_batch": int(best),
        "direct_entries_per_s": {batch: 1 / spread.median for batch, spread in singly.items()},
        "direct_s_extrapolated": Spread.of(whole),
        "build_s": Spread.of([build for build, _ in turns]),
        "read_s": Spread.of([read for _, read in turns]),
        "ratio": spread_of_ratios(whole, [build + read for build, read in turns]),
        "largest_difference": float(difference),
        "largest_key": float(tables(world.sample_nS).abs().max()),
        "table_bytes": tables.bytes,
        "pays_from_entries": factory.tables_pay_from(world.tokens_NS.shape[1]),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ENTRIESxHIDDEN")
    parser.add_argument("--tokens", type=positive, default=64, help="of an entry")
    parser.add_argument("--vocabulary", type=positive, default=30_522)
    parser.add_argument("--batches", type=positive, nargs="+", default=BATCHES)
    parser.add_argument("--sample", type=positive, default=1024, help="entries encoded singly")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--small", action="store_true", help="a quick look that says little")
    args = parser.parse_args()
    if args.small:
        args.sizes, args.vocabulary, args.tokens = ["3000x32"], 500, 16
        args.batches, args.sample, args.repeats = [16, 48], 100, 2
    facts = begin()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f"S={args.tokens}, V={args.vocabulary:,}, Q=128, {args.threads} thread(s)\n")
    figures = [measured(size, args) for size in args.sizes]
    rows = [
        [
            f"{row['entries']:,} x {row['hidden']}",
            f"{row['direct_entries_per_s'][str(row['best_batch'])]:,.0f} ({row['best_batch']})",
            row["direct_s_extrapolated"].shown(0),
            row["build_s"].shown(),
            row["read_s"].shown(),
            row["ratio"].shown(0),
            f"{row['largest_difference']:.1e}",
            f"{row['table_bytes'] / 1e6:.1f}",
        ]
        for row in figures
    ]
    print(
        table(
            ["entries x H", "singly, entries/s (batch)", "all singly, s, extrapolated",
             "building, s", "reading, s", "times faster", "largest difference", "tables, MB"],
            rows,
        )
    )  # fmt: skip
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
