"""`pluglm simulate` against the real system on this machine: parts measured, the whole foretold.

The parts are measured alone (`simulation_parts.py`), just before the whole system runs at the sizes
that fit this machine, so that both meet the same mood of it. The simulation, which has seen only
the parts, foretells the whole. The peer of every figure is what was measured. Two kinds of runs:

  searches  lockstep clients (processes) of a RayMemory, all asking once a round
  steps     trainers (DeepSpeed over gloo) whose every step searches a RayMemory

All processes share this machine's cores, in the simulation, too (`shared_cores`). When clients ask
within a round, and how long trainers compute, are measured, not foretold: a step's computing is
that of as many trainers, each with a memory in its own process. With --service FILE the parts are
measured at many sizes and written for `pluglm simulate --service`, and that is all, unless --check
is given, too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import simulation_parts
import torch
from harness import argument_parser, begin, finish, note, positive, table
from invented import write_store
from served import ENTRY_TOKENS, key_encoder, local_ray, other_weights
from simulation_parts import TOP_K
from simulation_whole import NAME, TIMEOUT_S, asked, trained
from training_overhead import VOCABULARY

from cluster.simulation.outcome import simulate
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import ServiceTimes, read_service_times
from memory_server.actors.client import RayMemory
from memory_server.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One run, measured and foretold; milliseconds, overhead as a share."""

    what: str
    measured: float
    foretold: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.foretold / self.measured - 1


def here(args: argparse.Namespace, **changes: Any) -> Scenario:
    """This machine: one set of cores, no network."""
    one = Scenario(
        entries=args.total,
        top_k=TOP_K,
        entry_tokens=ENTRY_TOKENS,
        latency_s=0.0,
        bandwidth_bytes_s=1e12,
        shared_cores=len(os.sched_getaffinity(0)),
        steps=2000,
        warmup=100,
    )
    return replace(one, **changes)


def check_searches(
    args: argparse.Namespace, service: ServiceTimes, shards: int, address: str
) -> list[Checked]:
    """Rounds of clients that ask together."""
    checked = []
    for clients in args.clients:
        for batch in args.batches:
            seconds, late = asked(clients, batch, args.rounds, address)
            told = simulate(
                here(args, shards=shards, trainers=clients, batch=batch, compute_before=1.0),
                replace(service, compute=late.ravel()),
                "events",
            )
            p50, p99 = 1e3 * np.quantile(seconds, [0.5, 0.99])
            what = f"{shards} shards, {clients} clients, {batch} queries"
            checked += [
                Checked(what=f"{what}: p50, ms", measured=p50, foretold=told.search_p50_ms),
                Checked(what=f"{what}: p99, ms", measured=p99, foretold=told.search_p99_ms),
            ]
            note(f"{checked[-2]}\n{checked[-1]}")
    return checked


def check_steps(
    args: argparse.Namespace,
    service: ServiceTimes,
    shards: int,
    address: str,
    computing: dict[int, Any],
) -> list[Checked]:
    """Training steps."""
    checked = []
    for ranks, compute in computing.items():
        steps, waits = trained(ranks, address, args)
        told = simulate(
            here(args, shards=shards, trainers=ranks, batch=args.train_batch),
            replace(service, compute=compute),
            "events",
        )
        alone_ms = 1e3 * float(compute.mean())
        step_ms, what = 1e3 * float(steps.mean()), f"{shards} shards, {ranks} trainers"
        checked += [
            Checked(what=f"{what}: step, ms", measured=step_ms, foretold=told.step_ms),
            Checked(
                what=f"{what}: search within a step, p50, ms",
                measured=1e3 * float(np.median(waits)),
                foretold=told.search_p50_ms,
            ),
            Checked(
                what=f"{what}: overhead",
                measured=float(waits.mean() / (steps - waits).mean()),
                foretold=told.overhead,
            ),
        ]
        note(f"computing alone {alone_ms:.1f} ms; " + "\n".join(map(str, checked[-3:])))
    return checked


def _store(path: Path, entries: int) -> Store:
    """Entries of the words that the trainers' model knows."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCABULARY, (entries, ENTRY_TOKENS), dtype=np.uint16)
    return write_store(path, tokens, vocab_size=VOCABULARY)


def _switching(memory: RayMemory, weights: Any, repeats: int) -> float:
    """Seconds in which the shards switch to an epoch that they hold."""
    told = []
    for turn in range(repeats):
        epoch = memory.stage(encoder_step=turn, weights=other_weights(weights, seed=turn))
        memory.wait_sealed(epoch, TIMEOUT_S)
        began = time.perf_counter()
        memory.activate(epoch)
        told.append(time.perf_counter() - began)
    return float(np.median(told))


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--service", type=Path, metavar="FILE", help="write the parts' times there")
    parser.add_argument("--check", action="store_true", help="check, too, where --service is given")
    parser.add_argument("--shards", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4])
    parser.add_argument("--batches", type=positive, nargs="+", default=[16, 64, 256])
    parser.add_argument("--trainers", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--total", type=positive, default=200_000, help="entries of the memory")
    parser.add_argument("--rounds", type=positive, default=400, help="of searches, per size")
    parser.add_argument("--steps", type=positive, default=60, help="of training, per size")
    parser.add_argument("--train-batch", type=positive, default=16, help="sequences of a trainer")
    parser.add_argument("--hidden", type=positive, default=256, help="of the key encoder")
    parser.add_argument(
        "--entries",
        type=positive,
        nargs="+",
        default=[1_000, 10_000, 100_000, 1_000_000],
        help="of one shard whose searches are measured alone",
    )
    parser.add_argument("--part-batches", type=positive, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="per part and size")
    parser.add_argument("--refreshed", type=positive, default=400_000, help="entries of a refresh")
    parser.add_argument("--refreshes", type=positive, default=3)
    return parser.parse_args()


def write_service(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """The parts at many sizes."""
    parts: dict[str, Any] = {
        "machine": facts,
        "search": simulation_parts.searches(
            args, args.entries, args.part_batches, time.process_time
        ),
        **simulation_parts.messages(args, args.part_batches),
        **simulation_parts.refresh(args),
    }
    with tempfile.TemporaryDirectory() as temporary:
        args.small_store = _store(Path(temporary) / "small", 1000).path
        steps, waits = trained(1, "", args)
        encoder, weights = key_encoder(args.hidden)
        with local_ray(3):
            memory = RayMemory.start(
                args.small_store, shards=2, encoder=encoder, weights=weights, name=NAME
            )
            parts["switch_s"] = _switching(memory, weights, 5)
            memory.close()
    parts["compute_s"] = (steps - waits).ravel().tolist()
    shortened = json.loads(json.dumps(parts), parse_float=lambda text: float(f"{float(text):.3g}"))
    args.service.write_text(json.dumps(shortened) + "\n", encoding="utf-8")
    note(f"written: {args.service}")


def parts_now(args: argparse.Namespace, shards: int, place: Path) -> ServiceTimes:
    """The parts as this machine has them now, at the sizes that are about to be checked."""
    together = max(args.clients) * max(args.batches)
    batches = sorted({*args.batches, args.train_batch, together})
    parts = {
        "search": simulation_parts.searches(args, [args.total // shards], batches),
        **simulation_parts.messages(args, batches),
        # Nothing is refreshed here.
        "encode_entries_per_s": 1.0,
        "refresh_slowdown": 1.0,
        "encode_share": 1.0,
        "switch_s": 0.0,
        "compute_s": [0.0],
    }
    path = place / f"parts-{shards}.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    return read_service_times(path)


def check(args: argparse.Namespace) -> list[Checked]:
    """The whole system at every size, and what the simulation says of it."""
    checked: list[Checked] = []
    encoder, weights = key_encoder(args.hidden)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        args.small_store = _store(home / "small", 1000).path
        store = _store(home / "store", args.total)
        for shards in args.shards:
            with local_ray(shards + 1):
                memory = RayMemory.start(
                    store.path, shards=shards, encoder=encoder, weights=weights, name=NAME
                )
                address = ray.get_runtime_context().gcs_address
                service = parts_now(args, shards, home)
                checked += check_searches(args, service, shards, address)
                computing = {}
                for ranks in args.trainers:
                    steps, waits = trained(ranks, "", args)
                    # Ranks wait for each other within a step, so theirs are one time, not several.
                    computing[ranks] = (steps - waits).mean(0)
                checked += check_steps(args, service, shards, address, computing)
                memory.close()
    return checked


def main() -> None:
    args = _arguments()
    facts = begin()
    torch.set_num_threads(1)
    if args.service is not None:
        write_service(args, facts)
        if not args.check:
            return
    checked = check(args)
    rows = [
        [one.what, f"{one.measured:.3f}", f"{one.foretold:.3f}", f"{100 * one.error:+.0f} %"]
        for one in checked
    ]
    print(table(["", "measured", "foretold", "error"], rows))
    errors = np.abs([one.error for one in checked])
    print(f"\nmedian of the errors' sizes: {100 * np.median(errors):.0f} %")
    finish(args.json, facts, args, checked)


if __name__ == "__main__":
    main()
