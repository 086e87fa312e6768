"""Held-out text while training goes on: every rank evaluates its share, the numbers are of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trainer.data.stream import TrainBatch
from trainer.distributed import sum_over_ranks
from trainer.engine import TrainingEngine
from trainer.evaluate import CONDITIONS, MaskedSum, Search, evaluate_batch

_SUFFIX = {"right": "", "shuffled": "_shuffled_memory", "none": "_without_memory"}


def heldout_numbers(
    engine: TrainingEngine,
    batches: Iterable[TrainBatch],
    search_for: Callable[[TrainBatch], Search],
) -> dict[str, float]:
    """Evaluate with the memory as it is now, shuffled, and without; collective.

    Args:
        engine: what is trained; in training mode again afterwards.
        batches: this rank's share, as many as every other rank has.
        search_for: the memory as a batch asks it, on the engine's device.

    Returns:
        ``loss`` and ``accuracy`` per mask, each also with the suffixes ``_shuffled_memory`` and
        ``_without_memory``, and ``right_entry_rate``; what nothing was measured for is left out.
    """
    engine.train(False)
    sums = torch.zeros(len(CONDITIONS) * 3 + 2, dtype=torch.float64)
    for batch in batches:
        there = batch.to(engine.device)
        by_name, found, asked = evaluate_batch(engine.model, there, search_for(there))
        totals = [by_name.get(name, MaskedSum()) for name in CONDITIONS]
        flat = [x for t in totals for x in (t.loss, t.correct, t.masks)]
        sums += torch.tensor([*flat, found, asked], dtype=torch.float64)
    values = sum_over_ranks(sums.to(engine.device)).tolist()
    engine.train()
    numbers: dict[str, float] = {}
    for i, name in enumerate(CONDITIONS):
        loss, correct, masks = values[3 * i : 3 * i + 3]
        if masks:
            numbers[f"loss{_SUFFIX[name]}"] = loss / masks
            numbers[f"accuracy{_SUFFIX[name]}"] = correct / masks
    if values[-1]:
        numbers["right_entry_rate"] = values[-2] / values[-1]
    return numbers
