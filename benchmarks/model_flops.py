"""Model FLOP utilisation of a whole training step, retrieval included.

BERT-base by default, under bf16 autocast on a GPU (float32 on a CPU): forward pass with a search of
a `LocalMemory` on the same device, backward pass, fused AdamW. The step's multiplications are
counted by torch's flop counter over the forward and the backward pass (2 per multiply-add; the
search, softmax, norms and the optimizer are not counted as useful work, but their time is in the
step's). The peak is the data sheet's dense bf16 rate for GPUs named below, else `--peak-tflops`,
else the rate of a large matrix product measured here, which is said.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Spread, argument_parser, begin, finish, positive, table
from invented import write_store
from torch.utils.flop_counter import FlopCounterMode
from training_step import FIRST_WORD, VARIANTS, Sizes, batches

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMConfig
from trainer.build import build_model
from trainer.optim import make_optimizer
from trainer.settings import OptimSettings

# Dense bf16 TFLOP/s by the makers' data sheets.
DATA_SHEET = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0}


def peak_tflops(device: str, given: float | None) -> tuple[float, str]:
    """(TFLOP/s, where the number is from)."""
    if given is not None:
        return given, "--peak-tflops"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for kind, peak in DATA_SHEET.items():
            if kind in name.split("-")[0].replace("NVIDIA ", "").split():
                return peak, f"data sheet of {kind}, dense bf16"
    return measured_tflops(device), "a matrix product measured here"


def measured_tflops(device: str) -> float:
    """The best of five large matrix products, in TFLOP/s."""
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = min(seconds_of(lambda: a @ a, device) for _ in range(5))
    return 2 * size**3 / best / 1e12


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Wall seconds of a call, the device's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Time steps, count their multiplications, and search apart."""
    device = args.device
    sizes = Sizes(
        **{n: getattr(args, n) for n in Sizes.__dataclass_fields__ if n != "padding"}, padding=0.0
    )
    entries = np.random.default_rng(0).integers(
        FIRST_WORD, sizes.vocabulary, (sizes.entries, sizes.entry_tokens)
    )
    store = write_store(folder / "store", entries.astype(np.uint16), vocab_size=sizes.vocabulary)
    config = PlugLMConfig(
        **sizes.config, num_memory_layers=1, top_k=sizes.top_k, **VARIANTS[args.variant]
    )
    model = build_model(config, seed=0).to(device).train()
    optimizer = make_optimizer(model, OptimSettings())
    stream = batches(sizes)
    searching: list[float] = []
    encoder = KeyEncoderFactory(config.to_dict(), device=device)
    with LocalMemory(store, encoder=encoder, weights=model.key_weights(), device=device) as memory:
        model.attach(memory)

        def step() -> None:
            ids, mask, labels = (part.to(device, non_blocking=True) for part in next(stream))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(ids, mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(args.warmup):
            step()
        with FlopCounterMode(display=False) as counter:
            step()
        spent = [seconds_of(step, device) for _ in range(args.repeats)]
        queries = torch.randn(sizes.batch, config.key_size, device=device)
        for _ in range(args.repeats):
            searching.append(seconds_of(lambda: memory.search(queries, sizes.top_k), device))
    return {
        "sizes": sizes,
        "step_ms": Spread.of([1000 * s for s in spent]),
        "search_ms": Spread.of([1000 * s for s in searching]),
        "tflop_per_step": counter.get_total_flops() / 1e12,
        "tflops": Spread.of([counter.get_total_flops() / 1e12 / s for s in spent]),
        "sequences_per_s": Spread.of([sizes.batch / s for s in spent]),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    for name, default in (
        ("hidden", 768), ("layers", 12), ("vocabulary", 30522), ("batch", 256), ("tokens", 128),
        ("entries", 100_000), ("entry-tokens", 64), ("top-k", 5), ("threads", 2),
        ("repeats", 20), ("warmup", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--variant", choices=list(VARIANTS), default=next(iter(VARIANTS)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None)
    parser.add_argument("--peak-tflops", type=float, default=None)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    facts = begin()
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        print(facts["gpu"])
    torch.set_num_threads(args.threads)
    peak, source = peak_tflops(args.device, args.peak_tflops)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    tflops = figures["tflops"]
    assert isinstance(tflops, Spread)
    figures |= {"peak_tflops": peak, "peak_source": source, "utilisation": tflops.median / peak}
    print(f"{figures['sizes']}, {args.variant} memory\npeak: {peak:,.2f} TFLOP/s ({source})\n")
    cells = [figures[name] for name in ("step_ms", "search_ms", "sequences_per_s", "tflops")]
    rows = [
        [
            args.device,
            *(cell.shown() for cell in cells if isinstance(cell, Spread)),
            f"{figures['utilisation']:.1%}",
        ]
    ]
    headers = ["device", "step, ms", "search alone, ms", "sequences/s", "TFLOP/s", "utilisation"]
    print(table(headers, rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
