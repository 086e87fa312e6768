"""What the memory is worth: masked-LM loss with the right memory, a shuffled one, and none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memory_server.api import Memory, Retrieved
from model import PlugLMForMaskedLM
from trainer.data.cursor import Cursor
from trainer.data.masking import MaskingSettings
from trainer.data.stream import Cutting, PositiveSource, Sequences, TrainBatch, step_batches

CONDITIONS = ("right", "shuffled", "none")
_SEED = 20_260
_BATCH = 32

OWN_ENTRY = "own entry in the memory"
OWN_DOCUMENT_OUT = "own document left out"


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """Sums over masked positions, which add up over batches and ranks."""

    loss: float = 0.0
    correct: float = 0.0
    masks: float = 0.0

    def __add__(self, other: MaskedSum) -> MaskedSum:
        return MaskedSum(
            loss=self.loss + other.loss,
            correct=self.correct + other.correct,
            masks=self.masks + other.masks,
        )

    def means(self) -> dict[str, float]:
        """{"loss": nats per mask, "accuracy": share, "masks": number}."""
        masks = max(self.masks, 1.0)
        return {"loss": self.loss / masks, "accuracy": self.correct / masks, "masks": self.masks}


def heldout_batches(
    dataset: Sequences,
    positives: PositiveSource | None,
    masking: MaskingSettings,
    *,
    sequences: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TrainBatch]:
    """Held-out sequences in a fixed shuffled order with fixed masks, dealt to the ranks.

    Every rank gets the same number of batches (collectives inside the model stay in step), so up to
    `world_size` - 1 sequences are left over.
    """
    share = min(sequences, len(dataset)) // world_size
    cursor = Cursor()
    while share > 0:
        size = min(_BATCH, share)
        batches, cursor = step_batches(
            dataset,
            positives,
            masking,
            seed=_SEED,
            cutting=Cutting(batch_size=size * world_size, micro_batch_size=size),
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )
        share -= size
        yield batches[0]


Search = Callable[[Tensor], Retrieved]


def shuffled(search: Search) -> Search:
    """Other sequences' entries: as many and as plausible as the right ones, but not theirs."""

    def lookup(queries_BQ: Tensor) -> Retrieved:
        found = search(queries_BQ)
        far = max(1, len(queries_BQ) // 2)
        return replace(
            found,
            ids=found.ids.roll(far, 0),
            scores=found.scores.roll(far, 0),
            tokens=found.tokens.roll(far, 0),
            doc_ids=found.doc_ids.roll(far, 0),
        )

    return lookup


@torch.no_grad()
def evaluate_batch(
    model: PlugLMForMaskedLM, batch: TrainBatch, search: Search
) -> tuple[dict[str, MaskedSum], float, float]:
    """Evaluate one batch under every condition; the model must be in eval mode.

    Args:
        model: with whole weights, or under ZeRO-3 on every rank at once.
        batch: masked sequences.
        search: the memory.

    Returns:
        (sums by condition; sequences whose right entry was among the first K; sequences that have
        a right entry).
    """
    sums: dict[str, MaskedSum] = {}
    found = asked = 0.0
    lookups: dict[str, Search | None] = {
        "right": search,
        "shuffled": shuffled(search) if len(batch.doc_ids) > 1 else None,
        "none": None,
    }
    for name, lookup in lookups.items():
        if name == "shuffled" and lookup is None:
            # One sequence alone has no other's entries.
            continue
        output = model(batch.input_ids, batch.attention_mask, labels=batch.labels, lookup=lookup)
        labels_m = batch.labels[batch.labels != model.config.ignored_label]
        sums[name] = MaskedSum(
            loss=float(output.mlm_loss) * len(labels_m),
            correct=float((output.logits.argmax(-1) == labels_m).sum()),
            masks=float(len(labels_m)),
        )
        if name == "right":
            found, asked = right_entries(output.retrievals[-1].retrieved, batch.positive_ids)
    return sums, found, asked


def right_entries(retrieved: Any, positive_ids_B: Tensor) -> tuple[float, float]:
    """(sequences whose right entry is among the retrieved, sequences that have a right entry)."""
    has_B = positive_ids_B >= 0
    hit_B = (retrieved.ids == positive_ids_B[:, None]).any(1) & has_B
    return float(hit_B.sum()), float(has_B.sum())


def evaluate_case(
    model: PlugLMForMaskedLM,
    memory: Memory,
    batches: Iterator[TrainBatch],
    *,
    k: int,
    exclude_own_document: bool,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate held-out batches with the live epoch of a memory, in this process alone.

    Returns:
        One case of `evaluation.json` without its name: `right_entry_rate` (None where the memory
        holds no entry of the text's documents), `conditions`, and `missing_shards` (true) if a
        search was answered without all shards.
    """
    model.train(False)
    totals = {name: MaskedSum() for name in CONDITIONS}
    found = asked = 0.0
    incomplete: set[int] = set()
    for batch in batches:
        there = batch.to(device)
        exclude = there.doc_ids if exclude_own_document else None

        def search(queries_BQ: Tensor, exclude: Tensor | None = exclude) -> Retrieved:
            reply = memory.search(queries_BQ, k, exclude_doc_ids=exclude)
            incomplete.update(reply.missing_shards)
            return reply

        sums, hits, wanted = evaluate_batch(model, there, search)
        totals = {name: totals[name] + sums.get(name, MaskedSum()) for name in CONDITIONS}
        found, asked = found + hits, asked + wanted
    return {
        "right_entry_rate": found / asked if asked else None,
        "conditions": {name: total.means() for name, total in totals.items() if total.masks},
        **({"missing_shards": True} if incomplete else {}),
    }


def evaluation_report(
    model: PlugLMForMaskedLM,
    memory: Memory,
    batches: Callable[[], Iterator[TrainBatch]],
    *,
    k: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Everything that `evaluation.json` holds: with the text's own entries, and without them.

    Args:
        model: the trained model, with whole weights.
        memory: whose live epoch answers.
        batches: opens the held-out batches afresh.
        k: entries per sequence.
        device: of the model.
    """
    own = evaluate_case(model, memory, batches(), k=k, exclude_own_document=False, device=device)
    if own["right_entry_rate"] is None:
        note = "the memory holds no entry of the text's documents"
        cases = [{"name": "this memory", "note": note, **own}]
    else:
        out = evaluate_case(model, memory, batches(), k=k, exclude_own_document=True, device=device)
        out["right_entry_rate"] = None
        note = "the memory holds the passage that the masked text was cut from, and may be read"
        note_out = "entries of the text's own document are kept out of its retrieval"
        cases = [
            {"name": OWN_ENTRY, "note": note, **own},
            {"name": OWN_DOCUMENT_OUT, "note": note_out, **out},
        ]
    masks = cases[0]["conditions"]["right"]["masks"]
    return {"k": k, "masks": int(masks), "cases": cases}


def describe_evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    """The lines that a person reads at the end of a run."""
    lines = [
        f"Held-out text, {evaluation['masks']} masked tokens, "
        f"{evaluation['k']} entries per sequence:"
    ]
    for case in evaluation["cases"]:
        parts = []
        words = {"right": "with the memory", "shuffled": "shuffled memory", "none": "no memory"}
        for name, label in words.items():
            means = case["conditions"].get(name)
            if means is not None:
                parts.append(f"{label} {means['loss']:.3f} ({means['accuracy']:.1%} right)")
        lines.append(f"  {case['name']}: masked-LM loss {', '.join(parts)}")
        if case["right_entry_rate"] is not None:
            lines.append(
                f"    the right entry was among the top {evaluation['k']} for "
                f"{case['right_entry_rate']:.1%} of the sequences"
            )
        if case.get("missing_shards"):
            lines.append(
                "    not all shards of the memory answered: with all of them it may do better"
            )
    return lines
