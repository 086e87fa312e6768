"""Knowledge updated without training: probes before an edit, after it, and after its rollback."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cluster.editing.edits import Editor, TokenizerPlace
from cluster.probes.edits import Edits, apply, check, planned
from cluster.probes.knowing import knowing, stating_entries
from cluster.probes.reading import Fitted
from cluster.probes.scoring import Answered, Figures, ask, by_group
from cluster.trained_model import TrainedModel
from memory_server.api import Memory
from memory_server.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What the edit did to probes that it is not about.

    Attributes:
        unchanged: share of the answers that stay.
        probability_change: mean of the absolute change of the right object's probability.
        returned: share of the answers that are as before after the rollback.
    """

    count: int
    unchanged: float
    probability_change: float
    returned: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update, measured.

    Attributes:
        stages: "without memory", "before", "after", "rolled back": figures by group of probes. The
            right answer is the fact's; in "after, new answer", where the probes have one, it is
            what the edit makes of it.
        changed: share of the answers that the edit changed.
        returned: share that is as before after the rollback, likewise of probabilities (to 1e-6).
        locality: None: no such probes were given.
        entries: before, after the edit, and in the end.
        versions: the content before, and with the edit.
        restored: whether the rollback brought back the very content that was there before.
        kept: whether the edit stays.
    """

    stages: dict[str, dict[str, Figures]]
    changed: float
    returned: float
    locality: Locality | None
    entries: tuple[int, int, int]
    versions: tuple[str, str]
    restored: bool
    kept: bool


def update_knowledge(
    trained: TrainedModel,
    store: Store,
    probes: Fitted,
    edits: Edits,
    *,
    k: int,
    locality: Fitted | None = None,
    candidates: Collection[int] | None = None,
    known_from_memory: bool = False,
    keep: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Update:
    """Measure, edit, measure, roll back, measure; not one gradient step.

    The store is left with the content that it had, also when something fails on the way, unless
    `keep` is on: then the edit stays after all has been measured. The edits are checked before
    anything is measured. Nobody else should edit the store meanwhile: the rollback would undo it.

    Args:
        k: entries that each memory layer reads.
        locality: probes that the edits are not about.
        candidates: token ids that may be answered; None: the whole vocabulary.
        known_from_memory: tell the facts apart that the memory holds, before the edits or after.

    Raises:
        ConfigError: as `planned`. What `Editor` raises.
    """
    start = store.manifest()
    before_version = start.version
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = planned(trained, store, probes, edits, folder)
        place = TokenizerPlace(given=trained.path)
        check(Editor(store=store, tokenizer=place), plan)
        stated = [stating_entries(trained, store, probes)] if known_from_memory else []
        say(f"computing the keys of {store.manifest().entries:,} entries ...")
        memory = stack.enter_context(trained.memory(store.location))
        editor = Editor(store=store, memory=memory, tokenizer=place)

        def asked(fitted: Fitted, of: Memory | None, new: bool = False) -> list[Answered]:
            return ask(trained, of, fitted, k=k, new_answers=new, candidates=candidates)

        def measured(what: str) -> tuple[list[Answered], list[Answered]]:
            say(f"asking {len(probes.probes):,} probes {what} ...")
            others = [] if locality is None else asked(locality, memory)
            return asked(probes, memory), others

        without = asked(probes, None)
        before, others_before = measured("before the edit")
        with ExitStack() as undone:
            undone.callback(_roll_back, store, editor, before_version)
            apply(editor, plan)
            if known_from_memory:
                stated.append(stating_entries(trained, store, probes))
            after_version, entries_after = store.manifest().version, store.manifest().entries
            after, others_after = measured("after it")
            edited = any(probe.new_answer is not None for probe in probes.probes)
            with_new = asked(probes, memory, new=True) if edited else []
        restored = store.manifest().segments == start.segments
        again, others_again = measured("after the rollback")
        if keep:
            editor.rollback(after_version)
        stages = {"without memory": without, "before": before, "after": after}
        if edited:
            stages["after, new answer"] = with_new
        stages["rolled back"] = again
        if stated:
            probes = knowing(probes, *stated)
        return Update(
            stages={name: by_group(probes, answers) for name, answers in stages.items()},
            changed=1 - _same(before, after),
            returned=_equal(before, again),
            locality=None
            if locality is None
            else Locality(
                count=len(others_before),
                unchanged=_same(others_before, others_after),
                probability_change=fmean(
                    abs(a.probability - b.probability)
                    for a, b in zip(others_before, others_after, strict=True)
                ),
                returned=_equal(others_before, others_again),
            ),
            entries=(start.entries, entries_after, store.manifest().entries),
            versions=(before_version, after_version),
            restored=restored,
            kept=keep,
        )


def _roll_back(store: Store, editor: Editor, version: str) -> None:
    if store.manifest().segments != store.manifest(version).segments:
        editor.rollback(version)


def _same(one: Sequence[Answered], other: Sequence[Answered]) -> float:
    """Share of equal answers."""
    return fmean(a.top == b.top for a, b in zip(one, other, strict=True))


def _equal(one: Sequence[Answered], other: Sequence[Answered]) -> float:
    """Share of equal answers of equal probability."""
    return fmean(
        a.top == b.top and abs(a.probability - b.probability) < 1e-6
        for a, b in zip(one, other, strict=True)
    )
