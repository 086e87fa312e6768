"""Search while the memory changes under it: p99 over the idle memory's, and what failed.

The load is one client that searches without pause. The peer of each phase is the idle memory, just
before it: a refresh with new weights, the swap of a whole domain, additions of 1,000 entries. A
reply counts as mixed when an epoch answers after a newer one has answered, when a shard is missing,
or when it has entries of both domains of a swap.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Spread, argument_parser, begin, finish, note, positive, table
from served import (
    Load,
    invented_segment,
    invented_store,
    key_encoder,
    local_ray,
    other_weights,
    queries_like,
)

from memory_server.actors.client import RayMemory
from memory_server.api import Memory
from memory_server.index.base import IndexSettings
from memory_server.store.store import Store
from memory_server.switch import show_content


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the load saw. `takes_s`: from the command to when every later reply reflects it."""

    name: str
    takes_s: Spread
    idle_p50_ms: float
    idle_p99_ms: float
    p50_ms: float
    p99_ms: float
    p99_ratio: float
    searches: int
    failures: int
    mixed: int


def measure(
    name: str,
    memory: Memory,
    change: Callable[[int], None],
    *,
    entries: int,
    batch: int,
    times: int,
    idle_s: float,
) -> Phase:
    """Search idle, then while the change is made, several times over."""
    queries = queries_like(memory, batch)
    with Load(memory, queries) as idle:
        time.sleep(idle_s)
    takes = []

    def of_one_domain(ids_BK: torch.Tensor) -> bool:
        """The swapped domains have numbers of their own; what was added is in all of them."""
        ids = ids_BK[(ids_BK >= 0) & ((ids_BK < 10 * entries) | (ids_BK >= 20 * entries))]
        return len((ids // (20 * entries)).unique()) <= 1

    with Load(memory, queries, belong_together=of_one_domain) as load:
        for number in range(times):
            began = time.perf_counter()
            change(number)
            takes.append(time.perf_counter() - began)
    for failure in load.failures[:3]:
        note(f"{name}: {type(failure).__name__}: {failure}")
    return Phase(
        name=name,
        takes_s=Spread.of(takes),
        idle_p50_ms=1e3 * idle.percentile(0.5),
        idle_p99_ms=1e3 * idle.percentile(0.99),
        p50_ms=1e3 * load.percentile(0.5),
        p99_ms=1e3 * load.percentile(0.99),
        p99_ratio=load.percentile(0.99) / idle.percentile(0.99),
        searches=len(load.seconds),
        failures=len(load.failures),
        mixed=load.mixed,
    )


def changes(
    memory: Memory, store: Store, weights: dict[str, torch.Tensor], entries: int
) -> dict[str, Callable[[int], None]]:
    """What is done to the memory; each returns when the next search reflects it."""

    def refresh(number: int) -> None:
        before = memory.info().epoch
        fresh = other_weights(weights, seed=number)
        epoch = memory.stage(encoder_step=number + 1, weights=fresh)
        memory.wait_sealed(epoch, 3600)
        memory.activate(epoch)
        memory.release(before)

    def add(number: int) -> None:
        path = invented_segment(store, f"add-{number}", 10 * entries + 1000 * number, 1000)
        show_content(memory, store.commit(add_segments=[path], message="add", domain="added"))

    def swap(number: int) -> None:
        old, new = ("first", "second") if number % 2 == 0 else ("second", "first")
        path = invented_segment(store, f"swap-{number}", (2 + number) * 20 * entries, entries)
        version = store.commit(
            add_segments=[path], domain=new, remove_domains=[old], message="swap"
        )
        show_content(memory, version, timeout_s=3600)

    return {"refresh": refresh, "add 1,000 entries": add, "swap of the domain": swap}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=1_000_000)
    parser.add_argument("--hidden", type=positive, default=256, help="of the key encoder")
    parser.add_argument("--shards", type=positive, default=2, help="each with one thread")
    parser.add_argument("--index", default="flat")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--times", type=positive, default=6, help="each change is made")
    parser.add_argument("--idle-s", type=float, default=15.0, help="seconds of the idle load")
    args = parser.parse_args()
    facts = begin()
    encoder, weights = key_encoder(args.hidden)
    phases: list[Phase] = []
    with tempfile.TemporaryDirectory() as directory, local_ray(args.shards + 1):
        store = invented_store(Path(directory) / "store", args.entries)
        began = time.perf_counter()
        with RayMemory.start(
            store.path,
            shards=args.shards,
            encoder=encoder,
            weights=weights,
            name="benchmark",
            index=IndexSettings(kind=args.index),
        ) as memory:
            note(f"live after {time.perf_counter() - began:.1f} s")
            for name, change in changes(memory, store, weights, args.entries).items():
                phases.append(
                    measure(
                        name,
                        memory,
                        change,
                        entries=args.entries,
                        batch=args.batch,
                        times=args.times,
                        idle_s=args.idle_s,
                    )
                )
                note(f"{name}: {phases[-1]}")
    print(
        f"N={args.entries:,}, batch {args.batch}, {args.shards} shards, {args.index}; each change "
        f"{args.times} times\n"
    )
    headers = ["change", "takes s", "idle p50", "idle p99", "p50 ms", "p99 ms", "p99 ratio",
               "searches", "failed", "mixed"]  # fmt: skip
    rows: list[list[Any]] = [
        [
            p.name,
            p.takes_s.shown(),
            f"{p.idle_p50_ms:.1f}",
            f"{p.idle_p99_ms:.1f}",
            f"{p.p50_ms:.1f}",
            f"{p.p99_ms:.1f}",
            f"{p.p99_ratio:.2f}",
            f"{p.searches:,}",
            str(p.failures),
            str(p.mixed),
        ]
        for p in phases
    ]
    print(table(headers, rows))
    finish(args.json, facts, args, phases)


if __name__ == "__main__":
    main()
