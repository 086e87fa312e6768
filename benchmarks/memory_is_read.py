"""Which variants of PlugLM read their memory: an ablation on the synthetic world.

Facts are drawn afresh every 20 steps, so a right answer can only be read from the memory. Each
variant trains through the trainer's own loop (one rank, DeepSpeed, sync refresh, retrieval loss in
all steps) with the memory in the same process, and is then asked for 500 facts that it was never
trained on, with the memory and without. Everything but the columns of the table is the same for
all. The peer is the paper's variant: shared values, batch norm on the query, normal start.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from harness import Spread, argument_parser, begin, finish, in_fresh_process, note, positive, table

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMForMaskedLM
from trainer.build import build_model, model_config
from trainer.checkpoint import CheckpointState
from trainer.control import Control
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.export import MODEL
from trainer.job import TrainJob
from trainer.loop import run_rank
from trainer.settings import (
    DataSettings,
    LoggingSettings,
    MemorySettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    RuntimeSettings,
    TrainSettings,
)
from trainer.settings_model import MemoryInit, QueryNorm, ValuePooling
from trainer.world.exam import CHANCE, examine
from trainer.world.prepare import prepare_world

TOP_K, STEPS_PER_WORLD, FINAL_LR_RATIO = 5, 20, 0.02


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs between two rows of the table."""

    values: ValuePooling
    query_norm: QueryNorm
    init: MemoryInit
    beta: float
    initializer_range: float

    @property
    def name(self) -> str:
        """As --only takes it."""
        parts = (self.values, self.query_norm, self.init, f"{self.initializer_range:g}")
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A trained variant, asked for facts that it was never trained on. Shares are from 0 to 1."""

    seed: int
    right_entry_rate: float
    accuracy: float
    accuracy_without_memory: float
    steps: int
    seconds: float


_PAIRS = (("shared", "batch"), ("separate", "batch"), ("separate", "layer"), ("tokens", "layer"))
VARIANTS = [
    Variant(
        values=cast(ValuePooling, values),
        query_norm=cast(QueryNorm, norm),
        init=cast(MemoryInit, init),
        beta=beta,
        initializer_range=spread,
    )
    # 0.02 is the library's default; at this width 0.1 gives activations of an ordinary size.
    for init, beta, spread in (("normal", 1.0, 0.02), ("normal", 1.0, 0.1), ("copy", 5.0, 0.1))
    for values, norm in _PAIRS
]


def settings_of(
    variant: Variant, run_dir: Path, *, seed: int, steps: int, lr: float
) -> TrainSettings:
    """The run's settings: a small model, everything but the variant always the same."""
    return TrainSettings(
        run=RunSettings(dir=str(run_dir), seed=seed),
        data=DataSettings(corpus="unused: the world is made in the run's directory"),
        model=ModelSettings(
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            intermediate_size=256,
            max_positions=16,
            dropout=0.0,
            memory_layers=1,
            memory_ffn_size=64,
            key_size=64,
            value_pooling=variant.values,
            query_norm=variant.query_norm,
            memory_init=variant.init,
            memory_beta_init=variant.beta,
            initializer_range=variant.initializer_range,
        ),
        memory=MemorySettings(top_k=TOP_K, refresh="sync", refresh_every_steps=STEPS_PER_WORLD),
        optim=OptimSettings(
            steps=steps,
            batch_size=64,
            lr=lr,
            min_lr_ratio=FINAL_LR_RATIO,
            retrieval_warmup_steps=steps,
        ),
        runtime=RuntimeSettings(trainers=1, zero_stage=0, device="cpu", threads_per_trainer=1),
        logging=LoggingSettings(log_every_steps=50, progress=False),
    )


def train_and_ask(variant: Variant, run_dir: Path, *, seed: int, steps: int, lr: float) -> Result:
    """Train one variant in this process and ask it for new facts."""
    settings = settings_of(variant, run_dir, seed=seed, steps=steps, lr=lr)
    run_dir.mkdir(parents=True)
    world = prepare_world(run_dir, settings)
    shape = model_config(
        settings.model, vocab_size=world.vocab_size, pad_token_id=world.pad_token_id
    )
    first = world.task.content_version(0)
    assert first is not None
    with LocalMemory(
        world.store,
        encoder=KeyEncoderFactory(shape.to_dict()),
        weights=build_model(shape, seed=seed).key_weights(),
        content_version=first,
    ) as memory:
        start = CheckpointState(
            step=0,
            cursor=Cursor(),
            trainers=1,
            zero_stage=settings.runtime.zero_stage,
            content_version=first,
            encoder_step=0,
            published_step=0,
        )
        job = TrainJob(
            settings=settings,
            run_dir=run_dir,
            task=world.task,
            memory=memory,
            epoch=memory.info().epoch,
            content_version=memory.info().content_version,
            tokenizer=world.tokenizer,
            model_config=shape.to_dict(),
            device="cpu",
            init_method=f"tcp://127.0.0.1:{_free_port()}",
            checkpoint=None,
            start=start,
            resolved_config={},
        )
        began = time.perf_counter()
        outcome = run_rank(job, 0, Control())
        elapsed = time.perf_counter() - began
        # At the end of training the memory holds the new facts alone, with the final keys.
        answers = examine(
            PlugLMForMaskedLM.from_pretrained(run_dir / MODEL),
            memory,
            load_tokenizer(world.tokenizer),
            world.task.new_facts,
            k=TOP_K,
        )
    return Result(
        seed=seed,
        right_entry_rate=answers.right_entry_rate,
        accuracy=answers.accuracy,
        accuracy_without_memory=answers.accuracy_without_memory,
        steps=outcome.step,
        seconds=elapsed,
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _row(variant: Variant, results: list[Result]) -> list[str]:
    def spread(name: str, digits: int = 2) -> str:
        return Spread.of([getattr(result, name) for result in results]).shown(digits)

    return [
        variant.values,
        variant.query_norm,
        f"{variant.init}, {variant.initializer_range:g}",
        f"{variant.beta:g}",
        spread("right_entry_rate"),
        spread("accuracy"),
        spread("accuracy_without_memory", 3),
        str(results[0].steps),
        spread("seconds", 0),
    ]


_HEADERS = [
    "values",
    "query norm",
    "start",
    "beta",
    "right entry in top-5",
    "accuracy with memory",
    "without",
    "steps",
    "seconds",
]


def _arguments() -> argparse.Namespace:
    names = [variant.name for variant in VARIANTS]
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=1200, help="per variant (default: 1200)")
    parser.add_argument("--seeds", type=positive, default=1, help="how many: 0, 1, ... (default 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak, of all (default: 1e-3)")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names)
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the runs and their metrics below this"
    )
    args = parser.parse_args()
    if args.keep is not None and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: holds files already; give a new directory")
    return args


def main() -> None:
    args = _arguments()
    facts = begin()
    chosen = [variant for variant in VARIANTS if variant.name in args.only]
    figures, rows = [], []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(args.keep or temporary)
        for variant in chosen:
            results = []
            for seed in range(args.seeds):
                run_dir = home / f"{variant.name}-seed{seed}"
                result = in_fresh_process(
                    train_and_ask, variant, run_dir, seed=seed, steps=args.steps, lr=args.lr
                )
                results.append(result)
                note(f"{variant.name}, seed {seed}: {result}")
            rows.append(_row(variant, results))
            figures.append({"variant": asdict(variant), "runs": [asdict(r) for r in results]})
    print(f"\n500 facts never trained on; guessing: {CHANCE:.3f}; peak learning rate {args.lr:g}")
    print(f"{args.seeds} seed(s); of several: median (lowest to highest)\n")
    print(table(_HEADERS, rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
