"""What a model answers to probes, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cluster.probes.reading import Fitted
from cluster.trained_model import TrainedModel
from memory_server.api import Memory

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answer to one probe.

    Attributes:
        rank: of the right object among all candidates, from 1; equals count as better ones.
        probability: of the right object, among all tokens.
        top: the candidate that is most probable.
    """

    rank: int
    probability: float
    top: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means over `count` probes: precision at 1 and at 10, mean reciprocal rank, probability."""

    count: int
    p_at_1: float
    p_at_10: float
    mrr: float
    probability: float


def ask(
    trained: TrainedModel,
    memory: Memory | None,
    fitted: Fitted,
    *,
    k: int,
    new_answers: bool = False,
    candidates: Collection[int] | None = None,
    batch_size: int = BATCH,
) -> list[Answered]:
    """Ask all probes.

    Args:
        memory: with this model's keys; None: the memory is unplugged.
        k: entries that each memory layer reads.
        new_answers: the right object is the one that an edit gives the fact.
        candidates: token ids that may be answered; None: the whole vocabulary.
        batch_size: probes per forward pass.

    Returns:
        One answer per probe, in their order.
    """
    right = fitted.new_answers if new_answers else fitted.answers
    allowed = None if candidates is None else torch.tensor(sorted(set(candidates)))
    # Sequences of like length together: the least padding.
    order = sorted(range(len(right)), key=lambda i: len(fitted.tokens[i]))
    answers: dict[int, Answered] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        logits_BV = _logits(trained, memory, fitted, places, k)
        truth_B = torch.tensor([right[i] for i in places])
        chances_B = logits_BV.softmax(-1).gather(1, truth_B.unsqueeze(1)).squeeze(1)
        of_truth_B1 = logits_BV.gather(1, truth_B.unsqueeze(1))
        among_BC = logits_BV if allowed is None else logits_BV[:, allowed]
        better_B = (among_BC >= of_truth_B1).sum(1).clamp(min=1)
        top_B = among_BC.argmax(1)
        if allowed is not None:
            top_B = allowed[top_B]
        rows = zip(places, better_B.tolist(), chances_B.tolist(), top_B.tolist(), strict=True)
        for place, rank, chance, top in rows:
            answers[place] = Answered(rank=rank, probability=chance, top=top)
    return [answers[i] for i in range(len(right))]


@torch.no_grad()
def _logits(
    trained: TrainedModel, memory: Memory | None, fitted: Fitted, places: Sequence[int], k: int
) -> Tensor:
    """Logits at the masks, float32 [B,V] on the CPU."""
    longest = max(len(fitted.tokens[i]) for i in places)
    pad = trained.tokenizer.pad_token_id
    ids_BT = torch.full((len(places), longest), pad)
    for row, i in enumerate(places):
        ids_BT[row, : len(fitted.tokens[i])] = torch.tensor(fitted.tokens[i])
    mask_BT = (ids_BT != pad).long()
    labels_BT = torch.full_like(ids_BT, trained.model.config.ignored_label)
    positions = [fitted.positions[i] for i in places]
    labels_BT[range(len(places)), positions] = 0  # only these positions are computed
    lookup: Callable[[Tensor], Any] | None = None
    if memory is None:
        trained.model.attach(None)
    else:
        lookup = lambda queries_BQ: memory.search(queries_BQ, k)  # noqa: E731
    logits = trained.model(
        ids_BT.to(trained.device),
        mask_BT.to(trained.device),
        labels=labels_BT.to(trained.device),
        lookup=lookup,
    ).logits
    if logits.ndim == 3:
        logits = logits[range(len(places)), positions]
    found: Tensor = logits.float().cpu()
    return found


def figures(answers: Sequence[Answered]) -> Figures:
    """The means. Raises ValueError: there is no answer."""
    if not answers:
        raise ValueError("there is no answer to take the mean of")
    return Figures(
        count=len(answers),
        p_at_1=fmean(a.rank <= 1 for a in answers),
        p_at_10=fmean(a.rank <= 10 for a in answers),
        mrr=fmean(1 / a.rank for a in answers),
        probability=fmean(a.probability for a in answers),
    )


def macro(groups: Sequence[Figures]) -> Figures:
    """The mean over groups of probes, each counted once; `count` is all probes."""
    return Figures(
        count=sum(group.count for group in groups),
        p_at_1=fmean(group.p_at_1 for group in groups),
        p_at_10=fmean(group.p_at_10 for group in groups),
        mrr=fmean(group.mrr for group in groups),
        probability=fmean(group.probability for group in groups),
    )


def by_group(fitted: Fitted, answers: Sequence[Answered]) -> dict[str, Figures]:
    """Figures of all probes, of the mean over relations, of each relation, and of what the memory
    can know and what not, where the probes say it."""
    groups: dict[str, list[Answered]] = {}
    relations: dict[str, list[Answered]] = {}
    for probe, answer in zip(fitted.probes, answers, strict=True):
        relations.setdefault(probe.relation, []).append(answer)
        if probe.known is not None:
            name = "the memory can know it" if probe.known else "the memory cannot know it"
            groups.setdefault(name, []).append(answer)
    found = {"all": figures(answers)}
    of_relations = {name: figures(of) for name, of in sorted(relations.items())}
    if len(of_relations) > 1:
        found["mean over relations"] = macro(list(of_relations.values()))
    found |= {name: figures(of) for name, of in sorted(groups.items())}
    if len(of_relations) > 1:
        found |= {f"relation {name}": of for name, of in of_relations.items()}
    return found
