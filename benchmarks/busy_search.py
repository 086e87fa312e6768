"""Search latency with other busy processes on the machine, over the same search when it is idle.

The other processes multiply matrices without pause. The peer is the same memory in the same run;
idle and busy take turns.
"""

from __future__ import annotations

import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from harness import Spread, argument_parser, begin, finish, positive, spread_of_ratios, table
from served import invented_store, key_encoder, local_ray, queries_like

from memory_server.actors.client import RayMemory


def burn() -> None:
    """Keep one core busy."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        matrix = torch.tanh(matrix @ matrix)


def busy_processes(count: int) -> list[BaseProcess]:
    started: list[BaseProcess] = []
    for _ in range(count):
        process = get_context("spawn").Process(target=burn, daemon=True)
        process.start()
        started.append(process)
    time.sleep(3.0)  # until they have imported torch
    return started


def median_ms(memory: RayMemory, queries: torch.Tensor, searches: int) -> float:
    times = []
    for _ in range(searches):
        began = time.perf_counter()
        memory.search(queries, 5)
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=100_000)
    parser.add_argument("--hidden", type=positive, default=256, help="of the key encoder")
    parser.add_argument("--shards", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--busy", type=positive, default=2, help="other processes")
    parser.add_argument("--searches", type=positive, default=100, help="per turn")
    parser.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args()
    facts = begin()
    encoder, weights = key_encoder(args.hidden)
    idle, busy = [], []
    with tempfile.TemporaryDirectory() as directory, local_ray(args.shards + 1):
        store = invented_store(Path(directory) / "store", args.entries)
        with RayMemory.start(
            store.path, shards=args.shards, encoder=encoder, weights=weights, name="benchmark"
        ) as memory:
            queries = queries_like(memory, args.batch)
            median_ms(memory, queries, args.searches)
            for _ in range(args.repeats):
                idle.append(median_ms(memory, queries, args.searches))
                others = busy_processes(args.busy)
                busy.append(median_ms(memory, queries, args.searches))
                for process in others:
                    process.terminate()
                    process.join()
    ratio = spread_of_ratios(busy, idle)
    row = [Spread.of(idle).shown(1), Spread.of(busy).shown(1), ratio.shown()]
    print(
        f"N={args.entries:,}, batch {args.batch}, {args.shards} shards, {args.busy} busy "
        f"processes; p50 of {args.searches} searches, medians (range) of {args.repeats} turns\n"
    )
    print(table(["idle p50 ms", "busy p50 ms", "ratio"], [row]))
    finish(args.json, facts, args, {"idle_ms": idle, "busy_ms": busy, "ratio": ratio})


if __name__ == "__main__":
    main()
