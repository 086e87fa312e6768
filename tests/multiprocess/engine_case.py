"""A small model and batches for the tests of the engine, and what plain torch makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import PlugLMForMaskedLM
from trainer.build import build_model, model_config
from trainer.checkpoint import read_parts_written, write_part
from trainer.distributed import barrier, sum_over_ranks
from trainer.engine import TrainingEngine
from trainer.optim import lr_factor, make_optimizer
from trainer.parameter_files import write_index
from trainer.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)

RANKS, BATCH, VOCAB, ENTRIES, K = 2, 8, 60, 30, 3
MOST_STEPS = 20
_OPTIM = ("optimizer", "lr", "fused", "grad_clip")
Numbers = dict[str, Any]


@cache
def computes_in(precision: str) -> bool:
    """Whether this machine's CPU can; asked as DeepSpeed does. Not all have float16."""
    if precision == "fp16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if precision == "bf16":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


@dataclass(frozen=True)
class Found:
    """A reply of the memory, as far as the model reads it."""

    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


def train_settings(
    stage: int, passes: int, *, ranks: int = RANKS, steps: int = 6, **changes: Any
) -> TrainSettings:
    """Weights above ZeRO-3's threshold for partitioning; gradients above the clipping norm."""
    optim: dict[str, Any] = {"batch_size": BATCH, "steps": steps, "lr": 3e-3, "grad_clip": 0.5}
    model = {"query_norm": changes.pop("query_norm", "batch")}
    optim |= {name: changes.pop(name) for name in _OPTIM if name in changes}
    return TrainSettings(
        data=DataSettings(corpus="none"),
        model=ModelSettings(
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            intermediate_size=192,
            max_positions=16,
            dropout=0.0,
            memory_ffn_size=192,
            key_size=8,
            **model,
        ),
        optim=OptimSettings(**optim),
        runtime=RuntimeSettings(
            trainers=ranks,
            zero_stage=stage,
            micro_batch_size=BATCH // ranks // passes,
            **changes,
        ),
    )


def new_model(settings: TrainSettings, seed: int = 4) -> PlugLMForMaskedLM:
    return build_model(model_config(settings.model, vocab_size=VOCAB, pad_token_id=0), seed=seed)


@cache
def global_batches() -> list[Numbers]:
    """Batches; sequences have between one and five labels, so parts differ in their masks."""
    random = torch.Generator().manual_seed(11)
    entries_NS = torch.randint(1, VOCAB, (ENTRIES, 6), generator=random)
    batches = []
    for _ in range(MOST_STEPS):
        ids_BT = torch.randint(1, VOCAB, (BATCH, 10), generator=random)
        labels_BT = torch.full_like(ids_BT, -100)
        for row in range(BATCH):
            labels_BT[row, : row % 5 + 1] = ids_BT[row, : row % 5 + 1]
        entry_BK = torch.randint(0, ENTRIES, (BATCH, K), generator=random)
        batches.append(
            {"ids": ids_BT, "labels": labels_BT, "entry": entry_BK, "tokens": entries_NS[entry_BK]}
        )
    return batches


def part_of(batch: Numbers, rows: slice, searches: list[int] | None = None) -> Numbers:
    """A part of a batch as the model's arguments; the entries found do not hang on the queries.

    Each search is noted in `searches`.
    """
    found = Found(batch["entry"][rows], batch["tokens"][rows], batch["entry"][rows])
    ids, labels = batch["ids"][rows], batch["labels"][rows]

    def lookup(queries_BQ: Tensor) -> Found:
        if searches is not None:
            searches.append(len(queries_BQ))
        return found

    return {"input_ids": ids, "labels": labels, "lookup": lookup}


def plain_losses(settings: TrainSettings) -> tuple[list[float], list[float], PlugLMForMaskedLM]:
    """The same training without DeepSpeed, ranks or parts."""
    model = new_model(settings).train()
    optimizer = make_optimizer(model, settings.optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(settings.optim))
    losses, norms = [], []
    for batch in global_batches()[: settings.optim.steps]:
        loss = model(**part_of(batch, slice(None))).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.grad_clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    return losses, norms, model


def engine_losses(
    engine: TrainingEngine,
    rank: int,
    steps: range,
    numbers: Numbers | None = None,
    searches: list[int] | None = None,
) -> list[float]:
    """Train as the loop does; the losses are those of the global batch."""
    settings = engine.settings
    micro, passes = settings.micro_batch_size, settings.accumulation_steps
    share = micro * passes
    engine.train()
    losses = []
    for step in steps:
        batch = global_batches()[step]
        masks = float((batch["labels"] != -100).sum())
        denominator = masks / (passes * settings.runtime.trainers)
        total = torch.zeros(())
        for start in range(rank * share, (rank + 1) * share, micro):
            inputs = part_of(batch, slice(start, start + micro), searches)
            output = engine.forward_backward(**inputs, loss_denominator=denominator)
            engine.step()
            total += output.mlm_loss.detach().float() * denominator
        losses.append(float(sum_over_ranks(total)) / masks)
        if numbers is not None:
            numbers.setdefault("grad_norm", []).append(engine.grad_norm)
            numbers.setdefault("lr", []).append(engine.lr)
    return losses


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    with engine.whole_weights() as model:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def save_engine(engine: TrainingEngine, folder: Path, rank: int) -> dict[str, Any]:
    """Save as a run does, without what does not belong to the engine; returns the counters."""
    if rank == 0:
        folder.mkdir(parents=True)
    barrier()
    write_part(folder, rank, engine.save(folder))
    barrier()
    if rank == 0:
        ranks = engine.settings.runtime.trainers
        write_index(folder, read_parts_written(folder, ranks, patience_s=1))
    barrier()
    return engine.counters()
