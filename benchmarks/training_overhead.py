"""Sequences per second of training with the memory over the same encoder without it.

One optimizer step (forward, backward, AdamW) of a whole batch, in one process, turn by turn:

  memory + warm-up  the memory searched and read, and the retrieval warm-up's loss (quickstart)
  memory            the memory searched and read
  no lookup         the peer: the very same model, called without a memory
  plain layers      another peer: the memory layer replaced by a plain layer of the same width

The memory is a LocalMemory of random entries in the same process; batches are random full-length
sequences with 15 % of the tokens masked. Small is the size of configs/quickstart.toml, one
trainer's part of its batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

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
from torch import Tensor

from cluster.config import load_config
from cluster.presets import preset
from memory_server.api import Memory, Retrieved
from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.build import build_model, model_config
from trainer.optim import make_optimizer
from trainer.settings import ModelSettings, OptimSettings

VOCABULARY, FIRST_WORD, CLS, MASK = 8192, 5, 2, 4
ENTRY_TOKENS, TOKENS, TOP_K, MASKED = 64, 65, 5, 0.15
WITH_WARMUP, WITH_MEMORY, NO_LOOKUP, PLAIN = (
    "memory + warm-up",
    "memory",
    "no lookup",
    "plain layers",
)
PARTS = ("forward", "retrieval", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Random sequences and, for the warm-up, random entries that stand for their own."""

    input_ids: Tensor
    labels: Tensor
    positive_tokens: Tensor
    positive_ids: Tensor


def model_settings(size: str) -> ModelSettings:
    """The shipped quickstart's model, or one of four times as many weights per layer."""
    small = load_config(preset("quickstart"), ["data.corpus=unused"]).model
    if size == "small":
        return small
    return replace(
        small,
        hidden_size=2 * small.hidden_size,
        intermediate_size=2 * small.intermediate_size,
        memory_ffn_size=2 * small.memory_ffn_size,
        num_heads=2 * small.num_heads,
        num_layers=6,
    )


def random_tokens(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [rows,tokens]: [CLS] and random words."""
    drawn = torch.randint(FIRST_WORD, VOCABULARY, (rows, tokens), generator=generator)
    drawn[:, 0] = CLS
    return drawn


def make_batch(size: int, entries_NS: Tensor, generator: torch.Generator) -> Batch:
    """Draw sequences, masks and positives."""
    truth = random_tokens(size, TOKENS, generator)
    masked = torch.rand(truth.shape, generator=generator) < MASKED
    masked[:, 0] = False
    positive = torch.randperm(len(entries_NS), generator=generator)[:size]
    return Batch(
        input_ids=truth.masked_fill(masked, MASK),
        labels=truth.masked_fill(~masked, -100),
        positive_tokens=entries_NS[positive],
        positive_ids=positive,
    )


class Trainee:
    """One model with its optimizer; `step` trains on the next batch and tells its parts' time."""

    def __init__(
        self,
        config: PlugLMConfig,
        batches: Iterator[Batch],
        *,
        memory: Memory | None = None,
        warmup: bool = False,
    ) -> None:
        self._model: PlugLMForMaskedLM = build_model(config, seed=0).train()
        self._optimizer = make_optimizer(self._model, OptimSettings())
        self._batches, self._memory, self._warmup = batches, memory, warmup
        self._retrieval = 0.0

    def step(self) -> dict[str, float]:
        """Seconds by part, and `total`."""
        batch = next(self._batches)
        extra: dict[str, Any] = {}
        if self._warmup:
            extra = {
                "positive_tokens": batch.positive_tokens,
                "positive_ids": batch.positive_ids,
                "doc_ids": batch.positive_ids // 4,
            }
        self._retrieval = 0.0
        began = time.perf_counter()
        output = self._model(
            batch.input_ids,
            torch.ones_like(batch.input_ids),
            labels=batch.labels,
            lookup=None if self._memory is None else self._search,
            **extra,
        )
        forward = time.perf_counter()
        output.loss.backward()
        backward = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        return {
            "forward": forward - began - self._retrieval,
            "retrieval": self._retrieval,
            "backward": backward - forward,
            "optimizer": end - backward,
            "total": end - began,
        }

    def _search(self, queries_BQ: Tensor) -> Retrieved:
        assert self._memory is not None
        began = time.perf_counter()
        found = self._memory.search(queries_BQ, TOP_K)
        self._retrieval += time.perf_counter() - began
        return found


def measure(args: argparse.Namespace, directory: Path) -> dict[str, list[dict[str, float]]]:
    """Train all of them, turn by turn, on the same batches."""
    generator = torch.Generator().manual_seed(0)
    entries_NS = random_tokens(args.entries, ENTRY_TOKENS, generator)
    store = write_store(
        directory / "store", entries_NS.numpy().astype(np.uint16), vocab_size=VOCABULARY
    )
    config = model_config(model_settings(args.size), vocab_size=VOCABULARY, pad_token_id=0)
    plain = PlugLMConfig.from_dict({**config.to_dict(), "num_memory_layers": 0})

    def batches() -> Iterator[Batch]:
        for number in count():
            own = torch.Generator().manual_seed(number)
            yield make_batch(args.batch, entries_NS, own)

    with LocalMemory(
        store,
        encoder=KeyEncoderFactory(config.to_dict()),
        weights=build_model(config, seed=0).key_weights(),
    ) as memory:
        steps: dict[str, Callable[[], dict[str, float]]] = {
            WITH_WARMUP: Trainee(config, batches(), memory=memory, warmup=True).step,
            WITH_MEMORY: Trainee(config, batches(), memory=memory).step,
            NO_LOOKUP: Trainee(config, batches()).step,
            PLAIN: Trainee(plain, batches()).step,
        }
        return turn_by_turn(steps, repeats=args.repeats, warmup=2)


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=["small", "medium"], default="small")
    parser.add_argument("--entries", type=positive, default=20_000, help="default: 20,000")
    parser.add_argument("--batch", type=positive, default=32, help="sequences (default: 32)")
    parser.add_argument("--repeats", type=positive, default=21, help="turns (default: 21)")
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
    shape = model_settings(args.size)
    print(
        f"{args.size}: H={shape.hidden_size}, {shape.num_layers} layers, {shape.memory_layers} of "
        f"them with memory, values: {shape.value_pooling}, vocabulary {VOCABULARY:,}; "
        f"B={args.batch}, T={TOKENS}, K={TOP_K}, N={args.entries:,} entries of {ENTRY_TOKENS} "
        f"tokens; {args.threads} thread(s), {args.repeats} turns: median (lowest to highest)\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        spent = measure(args, Path(directory))
    total = {name: [step["total"] for step in steps] for name, steps in spent.items()}
    rows, figures = [], []
    for name, steps in spent.items():
        speed = Spread.of([args.batch / s for s in total[name]])
        # Speeds are as the inverse of the times.
        over = {peer: spread_of_ratios(total[peer], total[name]) for peer in (NO_LOOKUP, PLAIN)}
        parts = {part: Spread.of([1000 * step[part] for step in steps]) for part in PARTS}
        rows.append(
            [name, speed.shown(1), *(over[peer].shown() for peer in over)]
            + [f"{parts[part].median:.1f}" for part in PARTS]
        )
        figures.append(
            {"variant": name, "sequences_per_s": speed, "speed_over": over, "parts_ms": parts}
        )
    headers = ["training", "sequences/s", f"over {NO_LOOKUP}", f"over {PLAIN}"]
    print(table([*headers, *(f"{part}, ms" for part in PARTS)], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
