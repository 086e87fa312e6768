"""What counting the reads of the memory costs a training step.

One trainer (DeepSpeed, the quickstart's model, a `LocalMemory` of random entries) makes every step
twice, counting and not counting, turn by turn on the same batch; who comes first changes. Beside
the ratio of the two, which a busy machine disturbs, the seconds inside the counter itself are
told: looking at the attention, adding up, and what a line of metrics takes, spread over the steps
between two lines. --known entries have been read before, so that the sums are as large as they get
in a long run.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    positive,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from invented import write_store
from training_overhead import (
    ENTRY_TOKENS,
    TOKENS,
    TOP_K,
    VOCABULARY,
    make_batch,
    model_settings,
    random_tokens,
)

from memory_server.local import LocalMemory
from model import KeyEncoderFactory
from trainer.build import build_model, model_config
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.reads.counter import ReadCounter
from trainer.reads.files import Counted
from trainer.reads.sample import Reads
from trainer.reads.shares import reads_of
from trainer.searching import MemoryLookup
from trainer.settings import DataSettings, OptimSettings, RuntimeSettings, TrainSettings


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and of them in the counter."""

    total: float
    counting: float


class Trainee:
    """An engine whose steps count or do not."""

    def __init__(
        self, args: argparse.Namespace, engine: TrainingEngine, memory: LocalMemory, entries: object
    ) -> None:
        self._args, self._engine, self._memory, self._entries = args, engine, memory, entries
        self._pool = ThreadPoolExecutor(1)
        known = np.arange(args.entries, args.entries + args.known)
        total = Reads.of(known, np.zeros(args.known))
        self._counter = ReadCounter(
            memory,
            rank=0,
            ranks=1,
            device=engine.device,
            counted=Counted(total=total, window=Reads.none(), since_step=0),
        )
        self._version = memory.info().content_version
        self._counter.figures(self._version)
        self._turns = {True: 0, False: 0}

    def step(self, counts: bool) -> Step:
        """One optimizer step on the next batch of this kind."""
        turn = self._turns[counts] = self._turns[counts] + 1
        generator = torch.Generator().manual_seed(turn)
        batch = make_batch(self._args.batch, self._entries, generator)  # type: ignore[arg-type]
        device = self._engine.device
        inputs = [t.to(device) for t in (batch.input_ids, batch.labels)]
        self._wait()
        began = time.perf_counter()
        output = self._engine.forward_backward(
            input_ids=inputs[0],
            attention_mask=torch.ones_like(inputs[0]),
            labels=inputs[1],
            output_attention=counts,
            lookup=MemoryLookup(
                self._memory,
                k=TOP_K,
                epoch=self._memory.info().epoch,
                exclude_doc_ids=None,
                pool=self._pool,
                waiting=nullcontext,
                note=lambda found: None,
            ),
        )
        self._engine.step()
        counting = time.perf_counter()
        if counts:
            self._counter.add(reads_of(output.retrievals))
            if turn % self._args.log_every == 0:
                self._counter.figures(self._version)
        counting = time.perf_counter() - counting
        self._wait()
        return Step(time.perf_counter() - began, counting)

    def close(self) -> None:
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()


def measure(args: argparse.Namespace, home: Path) -> dict[str, list[Step]]:
    """All steps, turn by turn."""
    entries_NS = random_tokens(args.entries, ENTRY_TOKENS, torch.Generator().manual_seed(0))
    store = write_store(home / "store", entries_NS.numpy().astype(np.uint16), vocab_size=VOCABULARY)
    settings = TrainSettings(
        data=DataSettings(corpus="none"),
        model=model_settings(args.size),
        optim=OptimSettings(batch_size=args.batch, steps=10 * args.repeats),
        runtime=RuntimeSettings(
            trainers=1, zero_stage=args.zero, precision=args.precision, device=args.device
        ),
    )
    config = model_config(settings.model, vocab_size=VOCABULARY, pad_token_id=0)
    model = build_model(config, seed=0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    start_process_group(args.device, rank=0, world_size=1, init_method=f"file://{home}/meeting")
    try:
        with LocalMemory(
            store,
            encoder=KeyEncoderFactory(config.to_dict()),
            weights=model.key_weights(),
            device=args.device,
        ) as memory:
            engine = TrainingEngine(model, settings, args.device)
            engine.train()
            trainee = Trainee(args, engine, memory, entries_NS)
            calls = {"counted": lambda: trainee.step(True), "not": lambda: trainee.step(False)}
            try:
                return turn_by_turn(calls, repeats=args.repeats, warmup=3)
            finally:
                trainee.close()
    finally:
        stop_process_group()


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--entries", type=positive, default=20_000, help="default: 20,000")
    parser.add_argument("--known", type=positive, default=900_000, help="default: 900,000")
    parser.add_argument("--batch", type=positive, default=32, help="sequences (default: 32)")
    parser.add_argument("--log-every", type=positive, default=10, help="steps (default: 10)")
    parser.add_argument("--repeats", type=positive, default=60, help="turns (default: 60)")
    parser.add_argument("--zero", type=int, choices=range(4), default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, default=1, help="of torch (default: 1)")
    args = parser.parse_args()
    if args.entries < max(TOP_K, args.batch):
        parser.error(f"--entries {args.entries}: must be at least {max(TOP_K, args.batch)}")
    return args


def main() -> None:
    args = _arguments()
    facts = begin()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(
        f"{args.size} model on {args.device}, B={args.batch}, T={TOKENS}, K={TOP_K}, "
        f"{args.entries:,} entries, {args.known:,} read before, a line of metrics every "
        f"{args.log_every} steps; {args.repeats} turns: median (lowest to highest)\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        spent = measure(args, Path(directory))
    total = {name: [step.total for step in steps] for name, steps in spent.items()}
    ratio = spread_of_ratios(total["counted"], total["not"])
    counting = [step.counting for step in spent["counted"]]
    # The mean, since a line of metrics comes once in a while.
    share = sum(counting) / sum(total["counted"])
    figures = {
        "counted_ms": Spread.of([1000 * s for s in total["counted"]]),
        "not_counted_ms": Spread.of([1000 * s for s in total["not"]]),
        "ratio": ratio,
        "in_the_counter_ms": Spread.of([1000 * s for s in counting]),
        "in_the_counter_share": share,
    }
    headers = ["step, ms", "not counting, ms", "ratio", "in the counter, ms", "share of a step"]
    row = [
        figures["counted_ms"].shown(1),  # type: ignore[attr-defined]
        figures["not_counted_ms"].shown(1),  # type: ignore[attr-defined]
        ratio.shown(3),
        figures["in_the_counter_ms"].shown(2),  # type: ignore[attr-defined]
        f"{100 * share:.2f} %",
    ]
    print(table(headers, [row]))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
