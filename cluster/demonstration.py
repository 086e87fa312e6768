"""Knowledge edited under a trained model: passages change one word, and the answers follow.

For sentences whose masked word the model reads from their passage, that word is replaced in the
passage by another. The edit is a commit and a new epoch, without a training step. How many answers
follow is counted over all edits, not shown on a chosen one.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memory_server.api import Entry, Memory, Retrieved
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from memory_server.switch import show_content
from model import PlugLMForMaskedLM
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.stream import TrainBatch
from trainer.export import read_exported, write_json
from trainer.job import TrainJob

_EDITS = 20


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A masked word that is read from an entry, and the word that is to take its place."""

    batch: int
    row: int
    position: int
    entry_id: int
    truth: int
    other: int


def demonstrate_edits(job: TrainJob, store_path: Path) -> list[str]:
    """Edit passages, ask again, and put them back; writes edits.json into the run's directory.

    Args:
        job: a finished run whose memory still serves the final epoch.
        store_path: the memory's store; two versions are committed, the second one as before.

    Returns:
        Lines for a person.
    """
    settings = job.settings
    model = read_exported(job.run_dir)
    tokenizer = load_tokenizer(job.tokenizer)
    batches = list(job.task.heldout(settings))
    asks = _Questions(model, job.memory, batches, settings.memory.top_k)
    cases = _choose(asks, job.memory, tokenizer)
    if not cases:
        return ["no masked word of the held-out text is read from the memory yet; nothing to edit"]
    before = asks.answers(cases)
    store = Store.open(store_path)
    originals = job.memory.entries([case.entry_id for case in cases])
    edited = [_edited(entry, case, tokenizer) for entry, case in zip(originals, cases, strict=True)]
    _commit(store, job.memory, edited, f"change one word in {len(cases)} passages")
    after = asks.answers(cases)
    _commit(store, job.memory, originals, f"put {len(cases)} passages back")
    again = asks.answers(cases)

    followed = sum(a == case.other for a, case in zip(after, cases, strict=True))
    returned = sum(a == b for a, b in zip(again, before, strict=True))
    records = [
        {
            "sentence": asks.sentence(case, tokenizer),
            "before": tokenizer.convert_ids_to_tokens(b),
            "edited_to": tokenizer.convert_ids_to_tokens(case.other),
            "after": tokenizer.convert_ids_to_tokens(a),
            "put_back": tokenizer.convert_ids_to_tokens(c),
        }
        for case, b, a, c in zip(cases, before, after, again, strict=True)
    ]
    summary = {"edits": len(cases), "followed": followed, "returned": returned}
    write_json(job.run_dir / "edits.json", {**summary, "cases": records})
    lines = [
        f"Knowledge edited without training: one word changed in {len(cases)} passages; the answer "
        f"followed in {followed}, and came back in {returned} when the passages were put back"
    ]
    for record in records[:2]:
        lines.append(f"  {record['sentence']}")
        lines.append(
            f"    answer: {record['before']}; passage edited to {record['edited_to']!r}: "
            f"{record['after']}; put back: {record['put_back']}"
        )
    return lines


class _Questions:
    """Masked held-out sentences, asked of the model with the memory as it is now."""

    def __init__(
        self, model: PlugLMForMaskedLM, memory: Memory, batches: Sequence[TrainBatch], k: int
    ) -> None:
        self.model, self.memory, self.batches, self.k = model, memory, batches, k

    @torch.no_grad()
    def probabilities(self, batch: TrainBatch, *, with_memory: bool) -> tuple[Tensor, Tensor]:
        """[B,T,V] and the retrieved ids [B,K] (empty without memory)."""
        found: list[Retrieved] = []

        def search(queries_BQ: Tensor) -> Retrieved:
            found.append(self.memory.search(queries_BQ, self.k))
            return found[-1]

        lookup = search if with_memory else None
        logits = self.model(batch.input_ids, batch.attention_mask, lookup=lookup).logits
        ids = found[-1].ids if found else torch.empty(0)
        return torch.softmax(logits, -1), ids

    def answers(self, cases: Sequence[_Case]) -> list[int]:
        """The most probable token of each case."""
        logits = {
            i: self.probabilities(self.batches[i], with_memory=True)[0]
            for i in {case.batch for case in cases}
        }
        return [int(logits[c.batch][c.row, c.position].argmax()) for c in cases]

    def sentence(self, case: _Case, tokenizer: Any) -> str:
        """The sentence as the model sees it, the asked word as [MASK], the other masks solved."""
        batch = self.batches[case.batch]
        ids_T = _truth(batch, case.row)[: int(batch.attention_mask[case.row].sum())]
        ids_T[case.position] = tokenizer.mask_token_id
        kept = [
            t for t in ids_T.tolist() if t not in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        ]
        text: str = tokenizer.decode(kept)
        return text


def _choose(asks: _Questions, memory: Memory, tokenizer: Any) -> list[_Case]:
    """Words that the model gets right with the memory and wrong without, at most one per sentence:
    those to whose probability the memory adds the most."""
    found: list[tuple[float, _Case]] = []
    for i, batch in enumerate(asks.batches):
        probabilities, ids = asks.probabilities(batch, with_memory=True)
        alone, _ = asks.probabilities(batch, with_memory=False)
        for row in range(len(batch.doc_ids)):
            entry_id = int(batch.positive_ids[row])
            if not bool((ids[row] == entry_id).any()):
                continue
            tokens = memory.entries([entry_id])[0].tokens
            for t in (batch.labels[row] >= 0).nonzero().flatten().tolist():
                truth = int(batch.labels[row, t])
                word = tokenizer.convert_ids_to_tokens(truth)
                following = _truth(batch, row)[t + 1 : t + 2]
                whole = not any(
                    piece.startswith("##")
                    for piece in tokenizer.convert_ids_to_tokens(following.tolist())
                )
                if (
                    int(batch.input_ids[row, t]) == tokenizer.mask_token_id
                    and whole
                    and word.isalpha()
                    and len(word) > 3
                    and tokens.count(truth) == 1
                    and int(probabilities[row, t].argmax()) == truth
                    and int(alone[row, t].argmax()) != truth
                ):
                    case = _Case(
                        batch=i, row=row, position=t, entry_id=entry_id, truth=truth, other=-1
                    )
                    gain = probabilities[row, t, truth] / alone[row, t, truth]
                    found.append((float(gain), case))
                    break
    found.sort(key=lambda pair: -pair[0])
    cases = [case for _, case in found[:_EDITS]]
    # Each passage gets the next case's word: as plausible a word, and surely another text's.
    others = [case.truth for case in cases[1:] + cases[:1]]
    return [
        replace(case, other=other)
        for case, other in zip(cases, others, strict=True)
        if other != case.truth
    ]


def _truth(batch: TrainBatch, row: int) -> Tensor:
    """The tokens of a sequence before it was masked, int64 [T]."""
    return torch.where(batch.labels[row] >= 0, batch.labels[row], batch.input_ids[row])


def _edited(entry: Entry, case: _Case, tokenizer: Any) -> Entry:
    tokens = tuple(case.other if token == case.truth else token for token in entry.tokens)
    kept = [t for t in tokens if t not in (tokenizer.pad_token_id, tokenizer.cls_token_id)]
    return replace(entry, tokens=tokens, text=tokenizer.decode(kept))


def _commit(store: Store, memory: Memory, entries: Sequence[Entry], message: str) -> None:
    """Replace entries by others of the same ids, and return when every search reflects it."""
    path = store.incoming / f"edit-{uuid.uuid4().hex}.arrow"
    write_segment(
        path,
        ids=[entry.id for entry in entries],
        doc_ids=[entry.doc_id for entry in entries],
        tokens_NS=np.asarray([entry.tokens for entry in entries]),
        texts=[entry.text for entry in entries],
        titles=[entry.title for entry in entries],
        sources=[entry.source for entry in entries],
        meta=store.meta,
    )
    version = store.commit(
        add_segments=[path], remove_ids=[entry.id for entry in entries], message=message
    )
    show_content(memory, version)
