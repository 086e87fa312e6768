"""Knowledge updated without training: probes before an edit, after it, and after its rollback."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cluster.config import ConfigError
from cluster.editing.edits import Editor, TokenizerPlace
from cluster.editing.passages import Knowledge
from cluster.probes.reading import Fitted, Probe
from cluster.probes.scoring import Answered, Figures, ask, by_group
from cluster.trained_model import TrainedModel
from memory_server.store.store import Store

SNIPPETS = "snippets"  # the domain of facts that are added from the probes themselves


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What is changed between the two evaluations, in this order.

    Attributes:
        remove_ids, remove_doc_ids: entries, and documents with all their entries.
        replace: rows with an id or a doc_id and the new text.
        add: rows of new text, to `domain`.
        snippets: add the probes' own snippets, titled with their subjects, as domain "snippets".
    """

    remove_ids: tuple[int, ...] = ()
    remove_doc_ids: tuple[int, ...] = ()
    replace: Knowledge | None = None
    add: Knowledge | None = None
    domain: str = "default"
    snippets: bool = False

    @property
    def none(self) -> bool:
        """Whether nothing is to be changed."""
        removed = self.remove_ids or self.remove_doc_ids
        return not (removed or self.replace or self.add or self.snippets)


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
        kept: whether the edit stays.
    """

    stages: dict[str, dict[str, Figures]]
    changed: float
    returned: float
    locality: Locality | None
    entries: tuple[int, int, int]
    versions: tuple[str, str]
    kept: bool


def update_knowledge(
    trained: TrainedModel,
    store: Store,
    probes: Fitted,
    edits: Edits,
    *,
    k: int,
    locality: Fitted | None = None,
    keep: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Update:
    """Measure, edit, measure, roll back, measure; not one gradient step.

    The store is left with the content that it had, also when something fails on the way, unless
    `keep` is on: then the edit stays after all has been measured.

    Raises:
        ConfigError: nothing to edit. What `Editor` raises.
    """
    if edits.none:
        raise ConfigError(
            "nothing is edited between the two evaluations; give --snippets, --add, --replace or "
            "--remove"
        )
    before_version = store.manifest().version
    with ExitStack() as stack:
        files = _snippet_file(stack, probes.probes) if edits.snippets else None
        say(f"computing the keys of {store.manifest().entries:,} entries ...")
        memory = stack.enter_context(trained.memory(store.location))
        editor = Editor(store=store, memory=memory, tokenizer=TokenizerPlace(given=trained.path))

        def measured(what: str) -> tuple[list[Answered], list[Answered]]:
            say(f"asking {len(probes.probes):,} probes {what} ...")
            others = [] if locality is None else ask(trained, memory, locality, k=k)
            return ask(trained, memory, probes, k=k), others

        without = ask(trained, None, probes, k=k)
        before, others_before = measured("before the edit")
        entries_before = store.manifest().entries
        with ExitStack() as undone:
            undone.callback(_roll_back, store, editor, before_version)
            _edit(editor, edits, files)
            after_version, entries_after = store.manifest().version, store.manifest().entries
            after, others_after = measured("after it")
            edited = any(probe.new_answer is not None for probe in probes.probes)
            with_new = ask(trained, memory, probes, k=k, new_answers=True) if edited else []
        again, others_again = measured("after the rollback")
        if keep:
            editor.rollback(after_version)
        stages = {"without memory": without, "before": before, "after": after}
        if edited:
            stages["after, new answer"] = with_new
        stages["rolled back"] = again
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
            entries=(entries_before, entries_after, store.manifest().entries),
            versions=(before_version, after_version),
            kept=keep,
        )


def _edit(editor: Editor, edits: Edits, snippets: Path | None) -> None:
    if edits.remove_ids or edits.remove_doc_ids:
        editor.remove(ids=edits.remove_ids, doc_ids=edits.remove_doc_ids)
    if edits.replace is not None:
        editor.update(edits.replace)
    if edits.add is not None:
        editor.add(edits.add, domain=edits.domain)
    if snippets is not None:
        editor.add(Knowledge(files=(snippets,)), domain=SNIPPETS)


def _roll_back(store: Store, editor: Editor, version: str) -> None:
    if store.manifest().segments != store.manifest(version).segments:
        editor.rollback(version)


def _snippet_file(stack: ExitStack, probes: Sequence[Probe]) -> Path:
    """The probes' snippets as a file of rows, each once."""
    rows = {probe.snippet: probe.subject for probe in probes if probe.snippet.strip()}
    if not rows:
        raise ConfigError("no probe has a snippet; name the column that holds them with --snippets")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = folder / f"{SNIPPETS}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text, title in rows.items():
            file.write(json.dumps({"title": title, "text": text, "source": SNIPPETS}) + "\n")
    return path


def _same(one: Sequence[Answered], other: Sequence[Answered]) -> float:
    """Share of equal answers."""
    return fmean(a.top == b.top for a, b in zip(one, other, strict=True))


def _equal(one: Sequence[Answered], other: Sequence[Answered]) -> float:
    """Share of equal answers of equal probability."""
    return fmean(
        a.top == b.top and abs(a.probability - b.probability) < 1e-6
        for a, b in zip(one, other, strict=True)
    )
