"""The edits between two evaluations: given as files and ids, or made from the probes themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import ConfigError
from cluster.editing.edits import Editor
from cluster.editing.passages import Knowledge
from cluster.probes.knowing import stating_entries
from cluster.probes.reading import Fitted
from cluster.trained_model import TrainedModel
from memory_server.errors import DuplicateEntry, UnknownEntry
from memory_server.store.store import Store
from trainer.corpus.settings import CLS_TOKENS

SNIPPETS = "snippets"  # the domain of facts that are added from the probes themselves


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What is changed between the two evaluations, in this order.

    Attributes:
        remove_ids, remove_doc_ids: entries, and documents with all their entries.
        remove_facts: the entries in which the probes' facts stand.
        replace: rows with an id or a doc_id and the new text.
        replace_facts: the entries in which the probes' facts stand become their replacements: the
            first of a fact's entries its text, the others go.
        add: rows of new text, to `domain`.
        snippets: add the probes' own snippets, titled with their subjects, as domain "snippets".
    """

    remove_ids: tuple[int, ...] = ()
    remove_doc_ids: tuple[int, ...] = ()
    remove_facts: bool = False
    replace: Knowledge | None = None
    replace_facts: bool = False
    add: Knowledge | None = None
    domain: str = "default"
    snippets: bool = False

    @property
    def none(self) -> bool:
        """Whether nothing is to be changed."""
        removed = self.remove_ids or self.remove_doc_ids or self.remove_facts
        return not (removed or self.replace or self.replace_facts or self.add or self.snippets)

    @property
    def of_facts(self) -> bool:
        """Whether the entries in which facts stand are changed."""
        return self.remove_facts or self.replace_facts

    def check(self) -> None:
        """Raise ConfigError: nothing is to be changed, or facts in two ways at once."""
        if self.none:
            raise ConfigError(
                "nothing is edited between the two evaluations; give --snippets, --add, --replace, "
                "--replace-with, --remove, --remove-doc or --remove-facts"
            )
        if self.remove_facts and self.replace_facts:
            raise ConfigError("--remove-facts and --replace-with change the same entries; give one")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Edits worked out on a memory's content: files of rows to add and replace, ids to remove."""

    remove_ids: tuple[int, ...]
    remove_doc_ids: tuple[int, ...]
    replace: tuple[Knowledge, ...]
    add: tuple[tuple[Knowledge, str], ...]


def planned(
    trained: TrainedModel, store: Store, probes: Fitted, edits: Edits, folder: Path
) -> Plan:
    """Work out what the edits come to; writes files of rows into `folder`, commits nothing.

    Raises:
        ConfigError: nothing to edit, no probe has a snippet or a replacement, no entry states a
            fact, two facts would replace one entry by different texts, or one text is too long.
    """
    edits.check()
    removed = dict.fromkeys(edits.remove_ids)
    replaced = [] if edits.replace is None else [edits.replace]
    if edits.of_facts:
        places = fact_entries(trained, store, probes)
        if edits.remove_facts:
            removed |= dict.fromkeys(entry for entries in places for entry in entries)
        else:
            texts, gone = _replacements(probes, places)
            _check_lengths(trained, store, texts)
            removed |= dict.fromkeys(gone)
            rows = [{"id": entry, "text": text} for entry, text in texts.items()]
            replaced.append(_rows(folder / "replacements.jsonl", rows))
    added = [] if edits.add is None else [(edits.add, edits.domain)]
    if edits.snippets:
        subjects = {p.snippet: p.subject for p in probes.probes if p.snippet.strip()}
        if not subjects:
            raise ConfigError(
                "no probe has a snippet; name the column that holds them with --snippets"
            )
        rows = [{"title": t, "text": s, "source": SNIPPETS} for s, t in subjects.items()]
        added.append((_rows(folder / f"{SNIPPETS}.jsonl", rows), SNIPPETS))
    return Plan(
        remove_ids=tuple(removed),
        remove_doc_ids=edits.remove_doc_ids,
        replace=tuple(replaced),
        add=tuple(added),
    )


def fact_entries(trained: TrainedModel, store: Store, probes: Fitted) -> list[tuple[int, ...]]:
    """The entries in which each probe's fact stands: as its file says, else those with both words.

    Raises:
        ConfigError: there is none for any probe.
    """
    found: list[tuple[int, ...]]
    if any(probe.entry is not None for probe in probes.probes):
        found = [() if probe.entry is None else (probe.entry,) for probe in probes.probes]
    else:
        found = stating_entries(trained, store, probes)
    if not any(found):
        raise ConfigError(
            "no entry of the memory holds the subject and the object of a probe, so there is no "
            "fact to change; name a column of entries' ids with --entry"
        )
    return found


def apply(editor: Editor, plan: Plan) -> None:
    """Carry the edits out, each in one commit. Raises what `Editor` raises."""
    _carry_out(editor, plan, ())


def check(editor: Editor, plan: Plan) -> None:
    """Refuse what could not be carried out, and commit nothing. Raises what `Editor` raises."""
    # Each edit is checked on what is there now: only where an earlier one of them has made room or
    # taken something away may a later one be judged differently, and then it is judged when made.
    several = bool(plan.remove_ids or plan.remove_doc_ids) + len(plan.replace) + len(plan.add) > 1
    after_others = (DuplicateEntry, UnknownEntry) if several else ()
    _carry_out(replace(editor, dry_run=True, memory=None), plan, after_others)


def _carry_out(editor: Editor, plan: Plan, excused: tuple[type[Exception], ...]) -> None:
    if plan.remove_ids or plan.remove_doc_ids:
        editor.remove(ids=plan.remove_ids, doc_ids=plan.remove_doc_ids)
    for rows in plan.replace:
        try:
            editor.update(rows)
        except excused:
            continue
    for rows, domain in plan.add:
        try:
            editor.add(rows, domain=domain)
        except excused:
            continue


def _replacements(
    probes: Fitted, places: Sequence[Sequence[int]]
) -> tuple[dict[int, str], list[int]]:
    """The new text of entries, and the entries that go."""
    texts: dict[int, str] = {}
    gone: list[int] = []
    for probe, entries in zip(probes.probes, places, strict=True):
        if not probe.replacement.strip() or not entries:
            continue
        first, *others = entries
        if texts.setdefault(first, probe.replacement) != probe.replacement:
            raise ConfigError(
                f"entry {first} would become two texts, {texts[first][:60]!r} and "
                f"{probe.replacement[:60]!r}; give each fact an entry of its own with --entry, or "
                "leave one of the facts out"
            )
        gone += others
    if not texts:
        raise ConfigError(
            "no probe has both a text in the column of --replace-with and an entry to replace"
        )
    return texts, [entry for entry in gone if entry not in texts]


def _check_lengths(trained: TrainedModel, store: Store, texts: dict[int, str]) -> None:
    """Raise ConfigError: a text has no room in the one entry whose place it takes."""
    room = store.meta.entry_tokens - CLS_TOKENS
    for entry, text in texts.items():
        ids = trained.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > room:
            raise ConfigError(
                f"the text {text[:60]!r} of --replace-with has {len(ids)} tokens, and entry "
                f"{entry} has room for {room}; shorten it"
            )


def _rows(path: Path, rows: list[dict[str, object]]) -> Knowledge:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return Knowledge(files=(path,))
