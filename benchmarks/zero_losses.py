"""Losses of ZeRO 0 to 3 side by side, and those of plain torch on one process.

Every rank is a process over gloo. The batches, the weights at the start and the entries that are
found are the same for all; the largest difference of any loss from plain torch's is told.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import argument_parser, begin, finish, note, positive, table
from torch import Tensor

from trainer.build import build_model, model_config
from trainer.distributed import sum_over_ranks
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.optim import lr_factor, make_optimizer
from trainer.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)

VOCAB, TOKENS, ENTRY_TOKENS, K = 500, 24, 12, 3


@dataclass(frozen=True)
class Found:
    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


@dataclass(frozen=True)
class Result:
    variant: str
    losses: list[float]
    milliseconds: float
    largest_difference: float = 0.0


def settings_of(args: Any, stage: int, ranks: int) -> TrainSettings:
    return TrainSettings(
        data=DataSettings(corpus="none"),
        model=ModelSettings(
            hidden_size=args.hidden,
            num_layers=4,
            num_heads=4,
            intermediate_size=4 * args.hidden,
            max_positions=TOKENS,
            dropout=0.0,
            memory_ffn_size=args.hidden,
            key_size=32,
            query_norm="batch",
        ),
        optim=OptimSettings(
            optimizer=args.optimizer,
            batch_size=args.batch,
            steps=args.steps,
            lr=2e-2 if args.optimizer == "lamb" else 2e-3,
        ),
        runtime=RuntimeSettings(trainers=ranks, zero_stage=stage, precision=args.precision),
    )


def inputs_of(settings: TrainSettings, step: int, rows: slice) -> dict[str, Any]:
    """A part of a step's batch; the memory's answer does not hang on the queries."""
    random = torch.Generator().manual_seed(step)
    batch = settings.optim.batch_size
    ids_BT = torch.randint(1, VOCAB, (batch, TOKENS), generator=random)
    labels_BT = ids_BT.masked_fill(torch.rand(batch, TOKENS, generator=random) > 0.2, -100)
    entry_BK = torch.randint(0, 1000, (batch, K), generator=random)
    # An entry's tokens follow from its id.
    tokens_BKS = (entry_BK.unsqueeze(-1) * 31 + torch.arange(ENTRY_TOKENS) * 7) % (VOCAB - 1) + 1
    found = Found(entry_BK[rows], tokens_BKS[rows], entry_BK[rows])
    return {
        "input_ids": ids_BT[rows],
        "labels": labels_BT[rows],
        "lookup": lambda _: found,
        "masks": float((labels_BT != -100).sum()),
    }


def new_model(settings: TrainSettings) -> Any:
    return build_model(model_config(settings.model, vocab_size=VOCAB, pad_token_id=0), seed=1)


def plain(settings: TrainSettings) -> Result:
    model = new_model(settings).train()
    optimizer = make_optimizer(model, settings.optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(settings.optim))
    losses = []
    began = time.perf_counter()
    for step in range(settings.optim.steps):
        inputs = inputs_of(settings, step, slice(None))
        del inputs["masks"]
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.grad_clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    spent = time.perf_counter() - began
    return Result("plain torch", losses, 1000 * spent / settings.optim.steps)


def rank_of_engine(rank: int, settings: TrainSettings, meeting: str, pipe: Any) -> None:
    """One rank; rank 0 sends its losses, which are those of the global batch."""
    torch.set_num_threads(1)
    ranks = settings.runtime.trainers
    start_process_group("cpu", rank=rank, world_size=ranks, init_method=meeting)
    # The table is the output, not what DeepSpeed thinks of the model.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    engine = TrainingEngine(new_model(settings), settings, "cpu")
    engine.train()
    share = settings.optim.batch_size // ranks
    rows = slice(rank * share, (rank + 1) * share)
    losses = []
    began = time.perf_counter()
    for step in range(settings.optim.steps):
        inputs = inputs_of(settings, step, rows)
        masks = inputs.pop("masks")
        output = engine.forward_backward(**inputs, loss_denominator=masks / ranks)
        engine.step()
        total = sum_over_ranks(output.mlm_loss.detach().double())
        losses.append(float(total) / ranks)
    spent = time.perf_counter() - began
    if rank == 0:
        pipe.send((losses, 1000 * spent / settings.optim.steps))
    stop_process_group()


def engine(settings: TrainSettings, folder: Path) -> Result:
    """All ranks, each a fresh process."""
    context = get_context("spawn")
    stage = settings.runtime.zero_stage
    reader, writer = context.Pipe(duplex=False)
    meeting = f"file://{folder}/meeting-{stage}"
    processes = [
        context.Process(target=rank_of_engine, args=(rank, settings, meeting, writer))
        for rank in range(settings.runtime.trainers)
    ]
    for process in processes:
        process.start()
    writer.close()
    losses, milliseconds = reader.recv()
    for process in processes:
        process.join()
    return Result(f"ZeRO-{stage}", losses, milliseconds)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=16, help="sequences, over all ranks")
    parser.add_argument("--hidden", type=positive, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--optimizer", choices=("adamw", "lamb"), default="adamw")
    args = parser.parse_args()
    facts = begin()
    torch.set_num_threads(1)
    print(
        f"{args.optimizer}, {args.precision}, {args.ranks} rank(s), H={args.hidden}, batch "
        f"{args.batch} x {TOKENS}\n"
    )
    results = [plain(settings_of(args, 0, 1))]
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(4):
            note(f"ZeRO-{stage} ...")
            result = engine(settings_of(args, stage, args.ranks), Path(folder))
            pairs = zip(result.losses, results[0].losses, strict=True)
            worst = max(abs(ours - theirs) for ours, theirs in pairs)
            results.append(
                Result(result.variant, result.losses, result.milliseconds, largest_difference=worst)
            )
    shown = sorted({0, args.steps // 4, args.steps // 2, 3 * args.steps // 4, args.steps - 1})
    rows = [
        [
            result.variant,
            *(f"{result.losses[step]:.5f}" for step in shown),
            "" if number == 0 else f"{result.largest_difference:.1e}",
            f"{result.milliseconds:.0f}",
        ]
        for number, result in enumerate(results)
    ]
    headers = ["", *(f"step {step + 1}" for step in shown), "largest difference", "ms per step"]
    print(table(headers, rows))
    finish(args.json, facts, args, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
