"""Weak scaling: the same batch per trainer at 1, 2 and 4 trainers, and what of it is communication.

A trainer is a process with one thread (or one GPU, --device cuda): the quickstart's model under
DeepSpeed ZeRO, a batch of random sequences, each step with its retrieval from a `LocalMemory` of
the process's own, so that the collectives are all that the trainers share. The peer of W trainers
is W processes that train at the same time, each for itself: they compete for the same cores and the
same memory bandwidth, and communicate nothing. What a step takes longer is communication.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Spread, argument_parser, begin, finish, note, positive, spread_of_ratios, table
from invented import write_store
from training_overhead import ENTRY_TOKENS, TOKENS, TOP_K, VOCABULARY, make_batch, model_settings

from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import KeyEncoderFactory
from trainer.build import build_model, model_config
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.searching import MemoryLookup
from trainer.settings import DataSettings, OptimSettings, RuntimeSettings, TrainSettings

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One run.

    Attributes:
        step_s: median seconds of a step; retrieval_s: of them, waiting for the memory.
    """

    trainers: int
    together: bool
    step_s: float
    retrieval_s: float


def settings_of(args: argparse.Namespace, ranks: int) -> TrainSettings:
    return TrainSettings(
        data=DataSettings(corpus="none"),
        model=model_settings(args.model),
        optim=OptimSettings(batch_size=args.batch * ranks, steps=args.warmup + args.steps),
        runtime=RuntimeSettings(
            trainers=ranks, zero_stage=args.zero, precision=args.precision, device=args.device
        ),
    )


def trainer(rank: int, args: argparse.Namespace, meeting: str | None, go: Any, pipe: Any) -> None:
    """One process: a rank of a group, or, without a meeting place, a group of its own."""
    if args.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ranks = args.ranks if meeting else 1
    with tempfile.TemporaryDirectory() as alone:
        start_process_group(
            args.device,
            rank=rank if meeting else 0,
            world_size=ranks,
            init_method=meeting or f"file://{alone}/meeting",
        )
        try:
            pipe.send(measured(args, ranks, go))
        finally:
            stop_process_group()


def measured(args: argparse.Namespace, ranks: int, go: Any) -> tuple[float, float]:
    """Medians of (seconds of a step, seconds of waiting for the memory)."""
    settings = settings_of(args, ranks)
    config = model_config(settings.model, vocab_size=VOCABULARY, pad_token_id=0)
    model = build_model(config, seed=0)
    memory = LocalMemory(
        Store.open(args.store),
        encoder=KeyEncoderFactory(config.to_dict()),
        weights=model.key_weights(),
        device=args.device,
    )
    generator = torch.Generator().manual_seed(torch.initial_seed() % 1000)
    entries = torch.randint(1, VOCABULARY, (4 * args.batch, ENTRY_TOKENS), generator=generator)
    engine = TrainingEngine(model, settings, args.device)
    engine.train()
    pool = ThreadPoolExecutor(1)
    steps, waits = [], []
    go.wait(TIMEOUT_S)  # all have started
    for _ in range(args.warmup + args.steps):
        batch = make_batch(args.batch, entries, generator)
        waiting = Waiting()
        began = time.perf_counter()
        engine.forward_backward(
            input_ids=batch.input_ids.to(args.device),
            attention_mask=torch.ones_like(batch.input_ids, device=args.device),
            labels=batch.labels.to(args.device),
            lookup=MemoryLookup(
                memory,
                k=TOP_K,
                epoch=memory.info().epoch,
                exclude_doc_ids=None,
                pool=pool,
                waiting=lambda waiting=waiting: waiting,
                note=lambda found: None,
            ),
        )
        engine.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - began)
        waits.append(waiting.seconds)
    pool.shutdown()
    memory.close()
    kept = slice(args.warmup, None)
    return Spread.of(steps[kept]).median, Spread.of(waits[kept]).median


class Waiting:
    """Adds up how long a step waits for the memory."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began


def run(args: argparse.Namespace, ranks: int, *, together: bool, place: Path) -> Speed:
    """As many fresh processes, to their end."""
    place.mkdir()
    context = get_context("spawn")
    go = context.Barrier(ranks)
    meeting = f"file://{place}/meeting" if together else None
    own = argparse.Namespace(**{**vars(args), "ranks": ranks})
    pipes, processes = [], []
    for rank in range(ranks):
        reader, writer = context.Pipe(duplex=False)
        processes.append(context.Process(target=trainer, args=(rank, own, meeting, go, writer)))
        processes[-1].start()
        writer.close()
        pipes.append(reader)
    try:
        told = [pipe.recv() for pipe in pipes]
    except EOFError:
        for process in processes:
            process.kill()
        raise RuntimeError("a trainer died; its error is above") from None
    for process in processes:
        process.join()
    # The slowest: that is what the step takes.
    return Speed(
        trainers=ranks,
        together=together,
        step_s=max(step for step, _ in told),
        retrieval_s=max(wait for _, wait in told),
    )


def _row(args: argparse.Namespace, runs: list[Speed], first: list[Speed]) -> list[str]:
    ranks = runs[0].trainers
    together = [run.step_s for run in runs if run.together]
    alone = [run.step_s for run in runs if not run.together]
    efficiency = spread_of_ratios([run.step_s for run in first if run.together], together)
    communication = "none"
    if alone:
        shares = [(a - b) / a for a, b in zip(together, alone, strict=True)]
        communication = f"{100 * Spread.of(shares).median:.0f} %"
    speed = Spread.of([ranks * args.batch / seconds for seconds in together])
    waiting = Spread.of([run.retrieval_s / run.step_s for run in runs if run.together])
    return [
        str(ranks),
        Spread.of(together).shown(3),
        Spread.of(alone).shown(3) if alone else "",
        speed.shown(1),
        f"{100 * efficiency.median:.0f} %",
        communication,
        f"{100 * waiting.median:.0f} %",
    ]


_HEADERS = [
    "trainers",
    "step, s",
    "the same, each for itself, s",
    "sequences/s",
    "efficiency",
    "communication",
    "waiting for the memory",
]


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", type=positive, default=[1, 2, 4])
    parser.add_argument("--batch", type=positive, default=16, help="per trainer (default: 16)")
    parser.add_argument("--model", choices=("small", "large"), default="small")
    parser.add_argument("--zero", type=int, choices=range(4), default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--entries", type=positive, default=4000)
    parser.add_argument("--steps", type=positive, default=20, help="measured (default: 20)")
    parser.add_argument("--warmup", type=positive, default=3, help="before them (default: 3)")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each (default: 3)")
    args = parser.parse_args()
    devices = torch.cuda.device_count() if args.device == "cuda" else None
    if devices is not None and devices < max(args.trainers):
        parser.error(f"--trainers {max(args.trainers)}: this machine has {devices} GPUs")
    return args


def main() -> None:
    args = _arguments()
    facts = begin()
    print(
        f"{args.model} model, ZeRO-{args.zero}, {args.precision}, {args.batch} sequences of "
        f"{TOKENS} tokens per trainer, {args.entries:,} entries; {args.repeats} run(s) of "
        f"{args.steps} steps each: median (lowest to highest)\n",
        flush=True,
    )
    by_ranks: dict[int, list[Speed]] = {ranks: [] for ranks in args.trainers}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, VOCABULARY, (args.entries, ENTRY_TOKENS), generator=random)
        args.store = write_store(
            home / "store", tokens.numpy().astype(np.uint16), vocab_size=VOCABULARY
        ).path
        for turn in range(args.repeats):
            for ranks, runs in by_ranks.items():
                for together in (True, False) if ranks > 1 else (True,):
                    place = home / f"{turn}-{ranks}-{together}"
                    runs.append(run(args, ranks, together=together, place=place))
                    note(str(runs[-1]))
    first = by_ranks[args.trainers[0]]
    print(table(_HEADERS, [_row(args, runs, first) for runs in by_ranks.values()]))
    finish(args.json, facts, args, [speed for runs in by_ranks.values() for speed in runs])


if __name__ == "__main__":
    main()
