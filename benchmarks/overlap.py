"""How much of a slow retrieval training hides when a micro-batch is cut in chunks.

A step (forward and backward pass, one memory layer, a `LocalMemory` of invented entries) with
--delays milliseconds added to every search, as a network or a busy server adds them: with the
whole batch at once, and in --chunks pieces whose searches run while others compute. How long a step
waits for the memory is measured where it waits; what the chunks wait less is hidden.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
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
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)
from invented import write_store
from torch import Tensor

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.build import build_model
from trainer.searching import MemoryLookup

VOCABULARY, ENTRY_TOKENS, KEPT = 8192, 32, 0.15


class Delayed:
    """A memory whose every search takes longer by a fixed time."""

    def __init__(self, memory: LocalMemory, delay_s: float) -> None:
        self._memory, self._delay_s = memory, delay_s

    def search(self, queries: Tensor, k: int, **options: Any) -> Any:
        time.sleep(self._delay_s)
        return self._memory.search(queries, k, **options)


def batch(size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) int64 [B,T], the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (size, tokens), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < KEPT
    return ids.masked_fill(masked, 4), ids.masked_fill(~masked, -100)


class Waited:
    """Adds up how long a step waits for the memory."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began


def step(
    model: PlugLMForMaskedLM,
    memory: Delayed,
    pool: ThreadPoolExecutor,
    ids: Tensor,
    labels: Tensor,
    chunks: int,
    waits: list[float],
) -> None:
    waited = Waited()
    lookup = MemoryLookup(
        memory,  # type: ignore[arg-type]
        k=5,
        epoch=1,
        exclude_doc_ids=None,
        pool=pool,
        waiting=lambda: waited,
        note=lambda found: None,
    )
    model(ids, labels=labels, lookup=lookup, retrieval_chunks=chunks).loss.backward()
    model.zero_grad(set_to_none=True)
    waits.append(waited.seconds)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--entries", type=positive, default=20_000)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--tokens", type=positive, default=128)
    parser.add_argument("--chunks", type=positive, default=2)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 5.0, 20.0], metavar="MS")
    parser.add_argument("--query-norm", nargs="+", default=["layer", "batch"], metavar="KIND")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=7)
    args = parser.parse_args()
    facts = begin()
    torch.set_num_threads(args.threads)
    ids, labels = batch(args.batch, args.tokens)
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, (args.entries, ENTRY_TOKENS))
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(args.chunks) as pool:
        store = write_store(Path(home) / "store", tokens, vocab_size=VOCABULARY)
        for kind in args.query_norm:
            config = PlugLMConfig(
                vocab_size=VOCABULARY,
                hidden_size=args.hidden,
                num_hidden_layers=args.layers,
                num_attention_heads=max(1, args.hidden // 64),
                intermediate_size=4 * args.hidden,
                max_position_embeddings=max(args.tokens, ENTRY_TOKENS),
                memory_ffn_size=args.hidden,
                num_memory_layers=1,
                query_norm=kind,
            )
            model = build_model(config, seed=0).train()
            factory = KeyEncoderFactory(config.to_dict())
            note(f"{kind}: encoding {args.entries:,} entries, then measuring")
            with LocalMemory(store.path, encoder=factory, weights=model.key_weights()) as memory:
                calls: dict[str, Callable[[], float]] = {}
                waits: dict[str, list[float]] = {}
                for delay in args.delays:
                    slow = Delayed(memory, delay / 1000)
                    for chunks in (1, args.chunks):
                        name = f"{delay:g}/{chunks}"
                        waits[name] = []
                        calls[name] = partial(
                            seconds,
                            partial(step, model, slow, pool, ids, labels, chunks, waits[name]),
                        )
                spent = turn_by_turn(calls, repeats=args.repeats)
            figures += [figure(kind, delay, args.chunks, spent, waits) for delay in args.delays]
    print(
        table(
            [
                "query_norm",
                "added ms",
                "whole, ms",
                f"{args.chunks} chunks, ms",
                "ratio",
                "whole waits, ms",
                "chunks wait, ms",
                "hidden",
            ],
            [
                [
                    one["query_norm"],
                    f"{one['delay_ms']:g}",
                    one["whole_ms"].shown(0),
                    one["chunks_ms"].shown(0),
                    one["ratio"].shown(),
                    one["whole_waits_ms"].shown(1),
                    one["chunks_wait_ms"].shown(1),
                    f"{100 * one['hidden']:.0f} %",
                ]
                for one in figures
            ],
        )
    )
    finish(args.json, facts, args, figures)


def figure(
    kind: str,
    delay: float,
    chunks: int,
    spent: dict[str, list[float]],
    waits: dict[str, list[float]],
) -> dict[str, Any]:
    """One row. `hidden`: the share of the whole batch's waiting that the chunks do without."""
    whole, cut = f"{delay:g}/1", f"{delay:g}/{chunks}"
    return {
        "query_norm": kind,
        "delay_ms": delay,
        "whole_ms": Spread.of([1000 * s for s in spent[whole]]),
        "chunks_ms": Spread.of([1000 * s for s in spent[cut]]),
        "ratio": spread_of_ratios(spent[cut], spent[whole]),
        "whole_waits_ms": Spread.of([1000 * s for s in waits[whole]]),
        "chunks_wait_ms": Spread.of([1000 * s for s in waits[cut]]),
        "hidden": 1 - float(np.median(waits[cut]) / np.median(waits[whole])),
    }


if __name__ == "__main__":
    main()
