"""What a GPU gives: a training step, exact search and a refresh, each beside a named peer there.

step     forward and backward pass under bfloat16 autocast, retrieval from a LocalMemory on the same
         device included, against transformers' BertForMaskedLM of that size and the same encoder
         without a memory; all read the same batches
search   FlatIndex over float32, bfloat16 and int8 keys against a plain product and torch.topk in
         float32, in blocks that fit; and faiss.GpuIndexFlatIP where FAISS sees the GPU
refresh  all keys of a memory by tables of the weights, built anew, against encoding entry by entry
         at the best of several batch sizes, extrapolated from a sample

Kernels are waited for before a clock is read. `--device cpu --small` tries the program.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
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
    spread_of_ratios,
    table,
    turn_by_turn,
)
from invented import write_store
from torch import Tensor
from training_step import BERT, FIRST_WORD, PAPER, PLAIN, RECIPE, VARIANTS, Sizes, make_batch
from transformers import BertConfig, BertForMaskedLM

from memory_server.index.base import IndexInput
from memory_server.index.flat_index import FlatIndex
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes
from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM, entry_encoder
from trainer.build import build_model

BLOCK = 1 << 20  # keys of a block of the index, and rows made at once
SEARCHES_WAIT: list[bool] = []  # not empty while searches are timed by themselves


def waited(device: str, call: Callable[[], object]) -> float:
    """Seconds of a call and of the kernels that it started."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def trainee(
    name: str, sizes: Sizes, store: Path, device: str, searching: list[float]
) -> Iterator[Callable[[], None]]:
    """One forward and backward pass of a model in training mode, at every call.

    Seconds of its searches alone are appended to `searching` while SEARCHES_WAIT holds something.
    """
    made = [tuple(part.to(device) for part in make_batch(sizes, seed)) for seed in range(4)]
    turn = iter(range(1 << 60))
    torch.manual_seed(0)
    with ExitStack() as stack:
        if name == BERT:
            model: Any = BertForMaskedLM(BertConfig(**sizes.config))
        else:
            memory_layers = int(name in VARIANTS)
            config = PlugLMConfig(
                **sizes.config,
                num_memory_layers=memory_layers,
                memory_ffn_size=sizes.hidden,
                top_k=sizes.top_k,
                **VARIANTS.get(name, {}),
            )
            model = build_model(config, seed=0)
            if memory_layers:
                encoder = KeyEncoderFactory(config.to_dict(), device=device)
                memory = LocalMemory(
                    store, encoder=encoder, weights=model.key_weights(), device=device
                )
                stack.enter_context(memory)

                def lookup(queries_BQ: Tensor) -> Any:
                    if not SEARCHES_WAIT:
                        return memory.search(queries_BQ, sizes.top_k)
                    found: list[Any] = []
                    searching.append(
                        waited(device, lambda: found.append(memory.search(queries_BQ, sizes.top_k)))
                    )
                    return found[0]

                model.attach(lookup)
        model.to(device).train()

        def step() -> None:
            ids, mask, labels = made[next(turn) % len(made)]
            with torch.autocast(device, torch.bfloat16):
                loss = model(ids, mask, labels=labels).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        yield step


def measure_step(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    sizes = Sizes(
        hidden=args.hidden, layers=args.layers, vocabulary=args.vocabulary, batch=args.batch,
        tokens=args.tokens, entries=args.entries[0], entry_tokens=64, top_k=5, threads=1, padding=0,
    )  # fmt: skip
    names = [PAPER, RECIPE, PLAIN, BERT]
    entries = np.random.default_rng(0).integers(
        FIRST_WORD, sizes.vocabulary, (sizes.entries, sizes.entry_tokens)
    )
    peaks = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = Path(folder) / "store"
        write_store(store, entries.astype(np.uint16), vocab_size=sizes.vocabulary)
        steps = {}
        searching: dict[str, list[float]] = {}
        for name in names:
            searching[name] = []
            steps[name] = stack.enter_context(
                trainee(name, sizes, store, args.device, searching[name])
            )
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                steps[name]()
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        spent = turn_by_turn(
            {name: partial(waited, args.device, step) for name, step in steps.items()},
            repeats=args.repeats,
            warmup=3,
        )
        # Apart, as their clocks wait for the device: where a step's time goes.
        searched = {}
        for name in names:
            del searching[name][:]
            SEARCHES_WAIT.append(True)
            for _ in range(args.repeats):
                steps[name]()
            SEARCHES_WAIT.clear()
            searched[name] = Spread.of([1000 * s for s in searching[name]] or [0.0])
    tokens = sizes.batch * sizes.tokens
    figures = [
        {
            "variant": name,
            "step_ms": Spread.of([1000 * s for s in spent[name]]),
            "search_ms": searched[name],
            "tokens_per_s": tokens / Spread.of(spent[name]).median,
            "over_plain": spread_of_ratios(spent[name], spent[PLAIN]),
            "over_bert": spread_of_ratios(spent[name], spent[BERT]),
            "peak_mib_of_a_step": peaks.get(name),
        }
        for name in names
    ]
    rows = [
        [
            figure["variant"],
            figure["step_ms"].shown(1),
            figure["search_ms"].shown(1),
            f"{figure['tokens_per_s']:,.0f}",
            figure["over_plain"].shown(),
            figure["over_bert"].shown(),
            "" if figure["peak_mib_of_a_step"] is None else f"{figure['peak_mib_of_a_step']:,.0f}",
        ]
        for figure in figures
    ]
    title = (
        f"Step: H={sizes.hidden}, {sizes.layers} layers, {sizes.batch} x {sizes.tokens} tokens, "
        f"{sizes.entries:,} entries, K=5"
    )
    heads = [
        "step",
        "ms",
        "of it search",
        "tokens/s",
        "over plain",
        "over BERT",
        "activations, MiB",
    ]
    return f"{title}\n\n{table(heads, rows)}", figures


def clustered_keys(count: int, width: int, device: str) -> Tensor:
    """float32 [count, width] about 1,000 centres."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(1000, width, generator=generator, device=device)
    keys = torch.empty(count, width, device=device)
    for start in range(0, count, BLOCK):
        block = keys[start : start + BLOCK]
        chosen = torch.randint(1000, (len(block),), generator=generator, device=device)
        block.normal_(generator=generator).mul_(0.5).add_(centres[chosen])
    return keys


def index_over(keys: Tensor, dtype: Any) -> FlatIndex:
    """A FlatIndex whose codes lie in blocks; exact keys are looked up."""
    count, device = len(keys), keys.device
    parts = []
    for start, stop in pairwise([*range(0, count, BLOCK), count]):
        codes = KeyCodes.empty(stop - start, keys.shape[1], dtype, device)
        codes.put(0, keys[start:stop])
        norm = float(keys[start:stop].norm(dim=1).max())
        parts.append((KeyBlock(codes=codes, largest_norm=norm, checksum=0), 0, stop - start))
    on_host = keys.cpu()
    return FlatIndex(
        IndexInput(
            keys=BlockedKeys(parts, keys.shape[1], device),
            ids_N=torch.arange(count, device=device),
            doc_ids_N=torch.arange(count, device=device) // 4,
            dead_rows=torch.empty(0, dtype=torch.int64, device=device),
            exact_keys=lambda rows: on_host[torch.from_numpy(rows)],
        )
    )


def plain_search(keys: Tensor, queries: Tensor, top_k: int) -> Tensor:
    """Row numbers [B,K] by a product and topk, a block of keys at a time."""
    scores, rows = [], []
    for start in range(0, len(keys), BLOCK):
        best = (queries @ keys[start : start + BLOCK].T).topk(top_k, dim=1)
        scores.append(best.values)
        rows.append(best.indices + start)
    best = torch.cat(scores, 1).topk(top_k, dim=1)
    return torch.cat(rows, 1).gather(1, best.indices)


def measure_search(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    figures: list[dict[str, Any]] = []
    plain = "product and topk"
    trouble = faiss_trouble() if args.device == "cuda" else ""
    if trouble:
        note(f"search: left out faiss.GpuIndexFlatIP: {trouble}")
    for count in args.entries:
        note(f"search: {count:,} keys ...")
        keys = clustered_keys(count, args.width, args.device)
        indexes = {name: index_over(keys, name) for name in ("float32", "bfloat16", "int8")}
        faiss_index = faiss_over(keys) if args.device == "cuda" and not trouble else None
        for batch in args.batches:
            generator = torch.Generator(args.device).manual_seed(batch)
            chosen = torch.randint(count, (batch,), generator=generator, device=args.device)
            noise = torch.randn(batch, args.width, generator=generator, device=args.device)
            queries = keys[chosen] + 0.3 * noise
            calls: dict[str, Callable[[], Any]] = {
                name: partial(index.search, queries, 5, None) for name, index in indexes.items()
            }
            calls[plain] = partial(plain_search, keys, queries, 5)
            if faiss_index is not None:
                calls["faiss.GpuIndexFlatIP"] = partial(
                    faiss_index.search, queries.cpu().numpy(), 5
                )
            timed = {name: partial(waited, args.device, call) for name, call in calls.items()}
            spent = turn_by_turn(timed, repeats=args.repeats, warmup=2)
            truth = plain_search(keys, queries, 5)
            for name in calls:
                found = calls[name]()
                rows_BK = getattr(found, "rows", found)
                if isinstance(rows_BK, tuple):
                    rows_BK = torch.from_numpy(rows_BK[1])
                rows_BK = rows_BK.to(truth.device)
                figures.append(
                    {
                        "entries": count,
                        "batch": batch,
                        "search": name,
                        "ms": Spread.of([1000 * s for s in spent[name]]),
                        "over_plain": spread_of_ratios(spent[name], spent[plain]),
                        "same_rows": float((rows_BK == truth).double().mean()),
                    }
                )
        del indexes, faiss_index, keys
    rows = [
        [
            f"{figure['entries']:,}, {figure['batch']}, {figure['search']}",
            figure["ms"].shown(),
            figure["over_plain"].shown(),
            f"{figure['same_rows']:.4f}",
        ]
        for figure in figures
    ]
    heads = ["keys, queries, search", "ms", f"over {plain}", "same rows"]
    return f"Search: Q={args.width}, K=5\n\n{table(heads, rows)}", figures


def faiss_trouble() -> str:
    """Why FAISS is left out; empty: it is not."""
    if find_spec("faiss") is None:
        return "it is not installed"
    from memory_server.index.faiss_gpu import gpu_trouble

    return gpu_trouble()


def faiss_over(keys: Tensor) -> Any:
    """FAISS's exact index on the GPU, with the same keys."""
    import faiss

    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, keys.shape[1])
    for start in range(0, len(keys), BLOCK):
        index.add(keys[start : start + BLOCK].cpu().numpy())
    return index


def measure_refresh(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    config = PlugLMConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.refresh_hidden,
        num_attention_heads=args.refresh_hidden // 64,
        num_hidden_layers=1,
        intermediate_size=args.refresh_hidden,
        max_position_embeddings=512,
    )
    weights = PlugLMForMaskedLM(config).key_weights()
    factory = KeyEncoderFactory(config.to_dict(), device=args.device)
    direct = factory(weights)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(1, args.vocabulary, (args.sample, 64), generator=generator)
    on_device = sample.to(args.device)

    def singly(batch: int) -> float:
        entry_encoder.DIRECT_ROWS = batch
        return waited(args.device, partial(direct, on_device)) / len(sample)

    def by_tables() -> float:
        def work() -> None:
            tables = factory.tables(weights, entry_tokens=64)
            assert tables is not None
            encoder = factory.from_tables(tables)
            for _ in range(max(1, args.refresh_entries // len(sample))):
                encoder(on_device)

        return waited(args.device, work)

    sizes = [64, 256, 1024, 4096]
    calls: dict[str, Callable[[], float]] = {str(size): partial(singly, size) for size in sizes}
    calls["tables"] = by_tables
    spent = turn_by_turn(calls, repeats=max(2, args.repeats // 3))
    tables = spent.pop("tables")
    best = min(spent, key=lambda size: Spread.of(spent[size]).median)
    whole = [args.refresh_entries * each for each in spent[best]]
    encoder = factory.from_tables(factory.tables(weights, entry_tokens=64))
    figure = {
        "entries": args.refresh_entries,
        "hidden": args.refresh_hidden,
        "best_batch": int(best),
        "direct_s_extrapolated": Spread.of(whole),
        "tables_s": Spread.of(tables),
        "ratio": spread_of_ratios(whole, tables),
        "largest_difference": float((encoder(on_device) - direct(on_device)).abs().max()),
    }
    heads = ["entries x H", "singly, s, extrapolated", "by tables, s", "times faster", "difference"]
    row = [
        f"{args.refresh_entries:,} x {args.refresh_hidden}",
        f"{figure['direct_s_extrapolated'].shown()} (batch {best})",
        figure["tables_s"].shown(),
        figure["ratio"].shown(0),
        f"{figure['largest_difference']:.1e}",
    ]
    return f"Refresh: S=64, Q=128\n\n{table(heads, [row])}", [figure]


PARTS = {"step": measure_step, "search": measure_search, "refresh": measure_refresh}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a quick look that says little")
    for name, default in (
        ("hidden", 768), ("layers", 12), ("vocabulary", 30522), ("batch", 64), ("tokens", 128),
        ("width", 128), ("refresh-entries", 10_000_000), ("refresh-hidden", 768),
        ("sample", 1 << 16), ("repeats", 9),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument(
        "--entries", type=positive, nargs="+", default=[1_000_000, 10_000_000],
        help="of the memories that are searched; the first is the step's",
    )  # fmt: skip
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 64, 1024])
    args = parser.parse_args()
    if args.small:
        args.hidden, args.layers, args.vocabulary, args.batch, args.tokens = 64, 2, 2000, 4, 32
        args.entries, args.batches, args.refresh_entries = [3000], [1, 8], 4000
        args.refresh_hidden, args.sample, args.repeats = 64, 1000, 3
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give --device cpu")
    facts = begin()
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        print(f"{facts['gpu']}, CUDA {torch.version.cuda}")
    figures = {}
    for part in args.parts:
        shown, figures[part] = PARTS[part](args)
        print(f"\n{shown}", flush=True)
        finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
