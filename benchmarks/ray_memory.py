"""Search through RayMemory (actors) against LocalMemory (in process), over the same entries.

The peer of the actors is the same index in one process with as many threads as the actors have
together. What is over its time is the price of the network, of the fan-out and of the merge.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

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
from served import invented_store, key_encoder, local_ray, queries_like

from memory_server.actors.client import RayMemory
from memory_server.local import LocalMemory


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=1_000_000)
    parser.add_argument("--hidden", type=positive, default=256, help="of the key encoder")
    parser.add_argument("--shards", type=positive, default=2, help="each with one thread")
    parser.add_argument("--batches", type=positive, nargs="+", default=[32, 512])
    parser.add_argument("--repeats", type=positive, default=9)
    args = parser.parse_args()
    facts = begin()
    torch.set_num_threads(args.shards)
    encoder, weights = key_encoder(args.hidden)
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, local_ray(args.shards + 1):
        store = invented_store(Path(directory) / "store", args.entries)
        local = LocalMemory(store, encoder=encoder, weights=weights)
        served = RayMemory.start(
            store.path,
            shards=args.shards,
            encoder=encoder,
            weights=weights,
            name="benchmark",
            threads_per_shard=1,
        )
        for batch in args.batches:
            queries = queries_like(local, batch, seed=batch)
            one, many = local.search(queries, 5).ids, served.search(queries, 5).ids
            # Queries travel as float16; what that loses is a part of the figure.
            same = float((one.unsqueeze(2) == many.unsqueeze(1)).any(2).float().mean())
            times = turn_by_turn(
                {
                    "local": partial(seconds, partial(local.search, queries, 5)),
                    "ray": partial(seconds, partial(served.search, queries, 5)),
                },
                repeats=args.repeats,
            )
            ratio = spread_of_ratios(times["ray"], times["local"])
            over_ms = Spread.of(
                [
                    1e3 * (r - 1.25 * one)
                    for r, one in zip(times["ray"], times["local"], strict=True)
                ]
            )
            local_ms, ray_ms = (
                Spread.of([1e3 * s for s in times[name]]) for name in ("local", "ray")
            )
            rows.append(
                [
                    str(batch),
                    local_ms.shown(1),
                    ray_ms.shown(1),
                    ratio.shown(),
                    over_ms.shown(1),
                    f"{same:.4f}",
                ]
            )
            figures.append(
                {"batch": batch, "local_ms": local_ms, "ray_ms": ray_ms, "ratio": ratio,
                 "over_1.25x_ms": over_ms, "same_ids": same}
            )  # fmt: skip
        served.close()
        local.close()
    print(f"N={args.entries:,}, K=5, {args.shards} shards of one thread, medians (range)\n")
    print(table(["batch", "local ms", "ray ms", "ratio", "ms over 1.25x", "same ids"], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
