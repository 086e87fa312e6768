"""The exam of a trained model: does it answer from the memory, and follow when that changes?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memory_server.api import Memory, Retrieved
from memory_server.store.store import Store
from memory_server.switch import show_content
from model import PlugLMForMaskedLM
from trainer.world.facts import Fact, another_thing
from trainer.world.store import add_facts, edit_fact, edit_facts, remove_facts
from trainer.world.words import THINGS

CHANCE = 1 / len(THINGS)
"""Accuracy of guessing."""
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to the questions for N facts. Shares are from 0 to 1.

    Attributes:
        answers: the word in place of [MASK] for each fact, read with the memory.
        accuracy: share that is the fact's thing; accuracy_without_memory: asked without it.
        right_entry_rate: share of the questions for which the fact's own entry was retrieved.
    """

    answers: tuple[str, ...]
    accuracy: float
    accuracy_without_memory: float
    right_entry_rate: float


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What `run_exam` found. Shares are from 0 to 1.

    Attributes:
        k: entries retrieved per question.
        first: all answers, before any change.
        fact: the one that is changed; edited: as the edit made it.
        answer, answer_after_edit, answer_after_removal, answer_after_rollback: to its question.
        others_unchanged_by_edit: share of the other answers that the edit left as they were.
        removed: how many facts were removed, the edited one among them.
        accuracy_on_removed: share of these whose thing was still said; `CHANCE` by guessing.
        accuracy_on_kept: of the facts that were not removed.
        unchanged_by_rollback: share of all answers that were the first ones again.
        edited_together: how many facts were edited in one commit after that.
        accuracy_on_edited: share of these whose new thing was said; old_answers_on_edited: whose
            old thing was still said.
        others_unchanged_by_edits: share of the other answers that were left as they were.
        unchanged_at_the_end: share of all answers that were the first ones again, rolled back.
    """

    k: int
    first: Answers
    fact: Fact
    edited: Fact
    answer: str
    answer_after_edit: str
    others_unchanged_by_edit: float
    removed: int
    accuracy_on_removed: float
    accuracy_on_kept: float
    answer_after_removal: str
    answer_after_rollback: str
    unchanged_by_rollback: float
    edited_together: int
    accuracy_on_edited: float
    old_answers_on_edited: float
    others_unchanged_by_edits: float
    unchanged_at_the_end: float


@torch.no_grad()
def examine(
    model: PlugLMForMaskedLM,
    memory: Memory,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    k: int,
    device: str = "cpu",
) -> Answers:
    """Ask for every fact's thing: from the memory's live epoch, and without a memory.

    Args:
        model: with whole weights; left in eval mode.
        memory: what it reads.
        tokenizer: of the model.
        facts: at least one; their ids are those of their entries.
        k: entries per question.
        device: of the model.
    """
    model.train(False)

    def search(queries_BQ: Tensor) -> Retrieved:
        return memory.search(queries_BQ, k)

    answers: list[str] = []
    without: list[str] = []
    found = 0
    for start in range(0, len(facts), _BATCH):
        batch = facts[start : start + _BATCH]
        # All questions have as many tokens, so there is no padding to mask.
        asked = tokenizer([fact.question for fact in batch], return_tensors="pt")
        input_ids_BT = asked["input_ids"].to(device)
        masked_BT = input_ids_BT == tokenizer.mask_token_id
        output = model(input_ids_BT, lookup=search)
        best_B = output.logits[masked_BT].argmax(-1).tolist()
        answers += tokenizer.convert_ids_to_tokens(best_B)
        best_B = model(input_ids_BT).logits[masked_BT].argmax(-1).tolist()
        without += tokenizer.convert_ids_to_tokens(best_B)
        own_B1 = torch.tensor([[fact.id] for fact in batch], device=device)
        found += int((output.retrievals[-1].retrieved.ids == own_B1).any(1).sum())
    return Answers(
        answers=tuple(answers),
        accuracy=_accuracy(answers, facts),
        accuracy_without_memory=_accuracy(without, facts),
        right_entry_rate=found / len(facts),
    )


def run_exam(
    model: PlugLMForMaskedLM,
    memory: Memory,
    store: Store,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    k: int,
    remove: int = 100,
    edit: int = 100,
    device: str = "cpu",
) -> Exam:
    """Ask, edit one fact and ask again, remove facts and ask again, roll back and ask again; then
    the same with many edits at once.

    Nothing is trained meanwhile: every change is a commit to the store that the memory stages and
    activates. At the end memory and store hold the facts that they held at the start.

    Args:
        model: the trained model, with whole weights; the memory's keys are made by its weights.
        memory: serves `store`; nobody else changes it meanwhile.
        store: whose head holds the facts.
        tokenizer: of the model.
        facts: new facts, all in the store's head.
        k: entries per question.
        remove: how many of the facts are removed together, fewer than there are.
        edit: how many of the facts are edited together, fewer than there are.
        device: of the model.

    Raises:
        ValueError: `remove` or `edit` is out of range. memory_server.errors.UnknownEntry: the head
            does not hold the facts. RefreshFailed: the memory could not show a version; says why.
    """
    for name, count in (("remove", remove), ("edit", edit)):
        if not 1 <= count < len(facts):
            raise ValueError(
                f"{name}={count}: must be from 1 to {len(facts) - 1}, so that some stay"
            )

    def ask() -> Answers:
        return examine(model, memory, tokenizer, facts, k=k, device=device)

    before = store.head()
    if memory.info().content_version != before:
        show_content(memory, before)
    first = ask()
    place = choose_fact(facts, first.answers)
    fact, answer = facts[place], first.answers[place]

    thing = another_thing(fact, avoid=[answer, *like_things(fact, facts)])
    version, edited = edit_fact(store, fact.id, thing, f"edit: {fact.text} -> {thing}")
    show_content(memory, version)
    after_edit = ask()

    others = [other for other in facts if other.id != fact.id][: remove - 1]
    gone = [edited.id, *(other.id for other in others)]
    show_content(memory, remove_facts(store, gone, f"remove {remove} facts"))
    after_removal = ask()

    show_content(memory, before)
    after_rollback = ask()
    add_facts(store, [fact, *others], "put the removed facts back as they were")

    # The last ones: the facts that were removed and put back are among the first.
    chosen = facts[-edit:]
    things = {
        each.id: another_thing(each, avoid=[each.thing, *like_things(each, facts)])
        for each in chosen
    }
    version, now = edit_facts(store, things, f"edit {edit} facts")
    show_content(memory, version)
    after_edits = ask()
    show_content(memory, before)
    at_the_end = ask()
    remove_facts(store, [each.id for each in now], "take the edited facts out")
    add_facts(store, chosen, "put the edited facts back as they were")
    edited_places = range(len(facts) - edit, len(facts))
    said = [after_edits.answers[place] for place in edited_places]

    removed_ids = {fact.id, *(other.id for other in others)}
    removed_places = [i for i, other in enumerate(facts) if other.id in removed_ids]
    kept_places = [i for i, other in enumerate(facts) if other.id not in removed_ids]
    return Exam(
        k=k,
        first=first,
        fact=fact,
        edited=edited,
        answer=answer,
        answer_after_edit=after_edit.answers[place],
        others_unchanged_by_edit=_same(first, after_edit, without=[place]),
        removed=remove,
        accuracy_on_removed=_accuracy_at(after_removal, facts, removed_places),
        accuracy_on_kept=_accuracy_at(after_removal, facts, kept_places),
        answer_after_removal=after_removal.answers[place],
        answer_after_rollback=after_rollback.answers[place],
        unchanged_by_rollback=_same(first, after_rollback),
        edited_together=edit,
        accuracy_on_edited=_accuracy(said, now),
        old_answers_on_edited=_accuracy(said, chosen),
        others_unchanged_by_edits=_same(first, after_edits, without=edited_places),
        unchanged_at_the_end=_same(first, at_the_end),
    )


def choose_fact(facts: Sequence[Fact], answers: Sequence[str]) -> int:
    """The place of the fact to change: the first that is answered right and that stands alone.

    A fact stands alone if no other one that shares a word with it is about the same thing; else,
    when it is gone, its thing could still be read from the other. Where no fact is both, one that
    is answered right is taken, and at last any.
    """
    right = [i for i, fact in enumerate(facts) if answers[i] == fact.thing]
    alone = (i for i in right if facts[i].thing not in like_things(facts[i], facts))
    return next(alone, right[0] if right else 0)


def like_things(fact: Fact, facts: Sequence[Fact]) -> set[str]:
    """The things of the other facts that share giver, verb or receiver with one."""
    words = set(fact.words[:3])
    return {f.thing for f in facts if f.id != fact.id and words.intersection(f.words[:3])}


def describe_exam(exam: Exam) -> list[str]:
    """The lines that a person reads."""
    first, number = exam.first, len(exam.first.answers)

    def dialogue(answer: str) -> str:
        return f"  {exam.fact.question} -> {answer}"

    return [
        f"{number} new facts are in the memory; the model was never trained on any of them.",
        f"  answered with the memory: {first.accuracy:.1%} right (a fact's own entry was among the "
        f"top {exam.k} for {first.right_entry_rate:.1%})",
        f"  answered without it: {first.accuracy_without_memory:.1%} right "
        f"(guessing: {CHANCE:.1%})",
        dialogue(exam.answer),
        f'One entry is edited, nothing is trained: the memory now says "{exam.edited.text}".',
        dialogue(exam.answer_after_edit),
        f"  of the {number - 1} other answers {exam.others_unchanged_by_edit:.1%} are as before",
        f"{exam.removed} facts are removed, this one among them.",
        dialogue(exam.answer_after_removal),
        f"  of the removed facts {exam.accuracy_on_removed:.1%} are still answered right "
        f"(guessing: {CHANCE:.1%}), of the others {exam.accuracy_on_kept:.1%}",
        "The memory is rolled back to the version before the edit.",
        dialogue(exam.answer_after_rollback),
        f"  of all answers {exam.unchanged_by_rollback:.1%} are the first ones again",
        f"{exam.edited_together} facts are edited in one commit, and that is rolled back, too.",
        f"  of these {exam.accuracy_on_edited:.1%} are answered with the new word, "
        f"{exam.old_answers_on_edited:.1%} with the old; {exam.others_unchanged_by_edits:.1%} of "
        "the other answers are as before",
        f"  rolled back, {exam.unchanged_at_the_end:.1%} of all answers are the first ones again",
    ]


def _accuracy(answers: Sequence[str], facts: Sequence[Fact]) -> float:
    right = sum(a == fact.thing for a, fact in zip(answers, facts, strict=True))
    return right / len(facts)


def _accuracy_at(given: Answers, facts: Sequence[Fact], places: Sequence[int]) -> float:
    return _accuracy([given.answers[i] for i in places], [facts[i] for i in places])


def _same(first: Answers, later: Answers, *, without: Collection[int] = ()) -> float:
    """Share of the answers that are equal, leaving out some places."""
    pairs = list(zip(first.answers, later.answers, strict=True))
    kept = [a == b for i, (a, b) in enumerate(pairs) if i not in without]
    return sum(kept) / max(len(kept), 1)
