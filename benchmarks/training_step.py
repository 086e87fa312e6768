"""Time and peak memory of a training step (forward and backward pass) beside two peers.

PlugLM with one memory layer, whose queries search a `LocalMemory` in every step, against
  plain   the same encoder with a plain layer in place of the memory layer; its last layer computes
          every position, as BERT's does ("plain, chosen": only the masked ones, as PlugLM's does)
  BERT    transformers' BertForMaskedLM of that size, whose head scores every position
All read the same batches, with the same 15 % of positions masked. Once with the paper's variant of
the memory (shared pooling, BatchNorm) and once with the recipes' (every token, LayerNorm).
Peak memory is the largest resident memory of a fresh process for each, above what it held once
everything was imported; PlugLM's holds the memory's keys too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    in_fresh_process,
    note,
    peak_resident_bytes,
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from invented import write_store
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig
from trainer.build import build_model

PAPER, RECIPE = "PlugLM, paper's", "PlugLM, recipe's"
PLAIN, CHOSEN, BERT = "plain", "plain, chosen", "BertForMaskedLM"
VARIANTS = {
    PAPER: {"value_pooling": "shared", "query_norm": "batch"},
    RECIPE: {"value_pooling": "tokens", "query_norm": "layer"},
}
FIRST_WORD, MASK, MASKED = 1000, 103, 0.15


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    hidden: int
    layers: int
    vocabulary: int
    batch: int
    tokens: int
    entries: int
    entry_tokens: int
    top_k: int
    threads: int
    padding: float

    @property
    def config(self) -> dict[str, Any]:
        """The settings that PlugLM and BERT share."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "intermediate_size": 4 * self.hidden,
            "max_position_embeddings": max(self.tokens, self.entry_tokens),
        }


Batch = tuple[Tensor, Tensor, Tensor]


def make_batch(sizes: Sizes, seed: int) -> Batch:
    """(input_ids, attention_mask, labels), int64 [B,T]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, sizes.tokens)
    truth = torch.randint(FIRST_WORD, sizes.vocabulary, shape, generator=generator)
    shortest = sizes.tokens - round(2 * sizes.padding * sizes.tokens)
    lengths = torch.randint(shortest, sizes.tokens + 1, (sizes.batch, 1), generator=generator)
    lengths = lengths if sizes.padding else torch.full_like(lengths, sizes.tokens)
    mask = torch.arange(sizes.tokens) < lengths
    masked = (torch.rand(shape, generator=generator) < MASKED) & mask
    ids = truth.masked_fill(masked, MASK).masked_fill(~mask, 0)
    return ids, mask.long(), truth.masked_fill(~masked, -100)


def batches(sizes: Sizes) -> Iterator[Batch]:
    """The same endless batches for everyone, made before they are asked for."""
    made = [make_batch(sizes, seed) for seed in range(4)]
    while True:
        yield from made


@contextmanager
def trainee(name: str, sizes: Sizes, store: Path) -> Iterator[Callable[[], None]]:
    """One forward and backward pass of a model in training mode, at every call."""
    stream = batches(sizes)
    torch.manual_seed(0)
    with ExitStack() as stack:
        if name == BERT:
            bert: Any = BertForMaskedLM(BertConfig(**sizes.config)).train()

            def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
                return bert(ids, mask, labels=labels).loss

        else:
            memory_layers = int(name in VARIANTS)
            config = PlugLMConfig(
                **sizes.config,
                num_memory_layers=memory_layers,
                memory_ffn_size=sizes.hidden,
                top_k=sizes.top_k,
                **VARIANTS.get(name, {}),
            )
            model: Any = build_model(config, seed=0).train()
            if memory_layers:
                encoder = KeyEncoderFactory(config.to_dict())
                weights = model.key_weights()
                note(f"{name}: encoding {sizes.entries:,} entries ...")
                memory = LocalMemory(store, encoder=encoder, weights=weights)
                model.attach(stack.enter_context(memory))

            def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
                if name != PLAIN:
                    return model(ids, mask, labels=labels).loss
                chosen = labels != -100
                hidden = model.pluglm(ids, mask).last_hidden_state[chosen]
                return F.cross_entropy(model.head(hidden), labels[chosen])

        def step() -> None:
            loss(*next(stream)).backward()
            (bert if name == BERT else model).zero_grad(set_to_none=True)

        yield step


def peak_memory(name: str, sizes: Sizes, store: Path, steps: int) -> int:
    """Bytes above what the process held before the model was made; meant for a fresh process."""
    torch.set_num_threads(sizes.threads)
    before = psutil.Process().memory_info().rss
    with trainee(name, sizes, store) as step:
        for _ in range(steps):
            step()
        return peak_resident_bytes() - before


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of this process during one call: what others take does not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(args: argparse.Namespace, sizes: Sizes) -> list[dict[str, Any]]:
    """Times turn by turn in this process, then peaks in one process each."""
    names = [PAPER, RECIPE, PLAIN, CHOSEN, BERT]
    clock = {"wall": seconds, "cpu": cpu_seconds}[args.clock]
    entries = np.random.default_rng(0).integers(
        FIRST_WORD, sizes.vocabulary, (sizes.entries, sizes.entry_tokens)
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = Path(folder) / "store"
        write_store(store, entries.astype(np.uint16), vocab_size=sizes.vocabulary)
        peaks = {
            name: in_fresh_process(peak_memory, name, sizes, store, args.peak_steps)
            for name in names
        }
        steps = {name: stack.enter_context(trainee(name, sizes, store)) for name in names}
        spent = turn_by_turn(
            {name: partial(clock, step) for name, step in steps.items()},
            repeats=args.repeats,
            warmup=2,
        )
    return [
        {
            "variant": name,
            "step_ms": Spread.of([1000 * s for s in spent[name]]),
            "over_plain": spread_of_ratios(spent[name], spent[PLAIN]),
            "over_plain_chosen": spread_of_ratios(spent[name], spent[CHOSEN]),
            "over_bert": spread_of_ratios(spent[name], spent[BERT]),
            "peak_mib": peaks[name] / 2**20,
            "peak_over_bert": peaks[name] / peaks[BERT],
        }
        for name in names
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    for name, default in (
        ("hidden", 256), ("layers", 4), ("vocabulary", 30522), ("batch", 32), ("tokens", 128),
        ("entries", 100_000), ("entry-tokens", 64), ("top-k", 5), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument(
        "--padding", type=float, default=0.0, help="mean share of padding, up to 0.45 (default: 0)"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a busy machine and one thread (default: wall)",
    )
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--peak-steps", type=positive, default=4)
    args = parser.parse_args()
    if not 0 <= args.padding <= 0.45:
        parser.error(f"--padding {args.padding}: allowed: 0 to 0.45")
    facts = begin()
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes.__dataclass_fields__})
    torch.set_num_threads(sizes.threads)
    print(f"{sizes}\n")
    figures = measure(args, sizes)
    rows = [
        [
            figure["variant"],
            figure["step_ms"].shown(0),
            *(figure[f"over_{peer}"].shown() for peer in ("plain", "plain_chosen", "bert")),
            f"{figure['peak_mib']:,.0f}",
            f"{figure['peak_over_bert']:.2f}",
        ]
        for figure in figures
    ]
    over = ["over plain", "over plain, chosen", "over BERT"]
    print(table(["step", "ms", *over, "peak, MiB", "over BERT's"], rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
