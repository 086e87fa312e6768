"""Probes in LAMA's format: read from a file, and fitted to a model's tokenizer.

A probe is a fact and a sentence in which its object is masked: `template` with [X] for the subject
and [Y] for the object, or a ready `masked_sentence`. Source: Petroni et al., 2019,
https://arxiv.org/abs/1909.01066.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import ConfigError
from cluster.memory_tools import MASK
from cluster.probes.tokens import answer_token, sentence_ids
from cluster.trained_model import TrainedModel
from trainer.finetune.errors import TaskDataError
from trainer.finetune.tables import Table, read_table

SUBJECT_SLOT, OBJECT_SLOT = "[X]", "[Y]"
SUBJECTS = ("sub", "sub_label", "subject")
ANSWERS = ("obj", "obj_label", "object")
RELATIONS = ("relation", "predicate_id", "predicate")
SENTENCES = ("masked_sentence", "masked_sentences")
Prompt = Literal["template", "sentence"]
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns that not every file has; None: not asked for.

    Attributes:
        snippet: a text that states the fact, a ready entry.
        known: whether the memory can know the fact.
        new_answer: the object that an edit gives the fact.
        replacement: the text that an edit puts where the fact stands.
        entry: the id of the memory's entry in which the fact stands.
    """

    snippet: str | None = None
    known: str | None = None
    new_answer: str | None = None
    replacement: str | None = None
    entry: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One fact; `text` holds [MASK] once, or is empty where a file has no sentence for it.

    `new_answer` is what an edit makes of `answer`; the others are as `Columns` says.
    """

    subject: str
    answer: str
    text: str
    relation: str = ""
    snippet: str = ""
    known: bool | None = None
    new_answer: str | None = None
    replacement: str = ""
    entry: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Probes as a model takes them.

    Attributes:
        probes: those that fit, without repetitions.
        tokens: of each, with [CLS] and [SEP].
        positions: of the mask. answers, new_answers: token ids; the new one is the old one where
            the probe has none.
        unfit: what was left out, one line each.
        repeated: how many said what another one says.
    """

    probes: tuple[Probe, ...]
    tokens: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    answers: tuple[int, ...]
    new_answers: tuple[int, ...]
    unfit: tuple[str, ...]
    repeated: int


def read_probes(
    path: Path | str, *, prompt: Prompt | None = None, columns: Columns | None = None
) -> list[Probe]:
    """Read a file of probes: .jsonl, .csv, .tsv or .parquet.

    Args:
        prompt: what to ask with; None: each row's template, or its sentence where it has none.
        columns: which further columns to read.

    Raises:
        TaskDataError: no such file, no rows, a missing column, a template without its slots, a
            sentence without [MASK]; names the row.
    """
    columns = columns or Columns()
    table = read_table(path, "the probes")
    subject, answer = column_of(table, SUBJECTS), column_of(table, ANSWERS)
    relation = next((name for name in RELATIONS if name in table.columns), None)
    sentence = next((name for name in SENTENCES if name in table.columns), SENTENCES[0])
    templates, sentences = _asked(table, sentence, prompt)
    extra = {
        option: table.column(name, f"--{option}")
        for option, name in (
            ("snippets", columns.snippet),
            ("known", columns.known),
            ("new-answer", columns.new_answer),
            ("replace-with", columns.replacement),
            ("entry", columns.entry),
        )
        if name is not None
    }
    probes = []
    for row in range(len(table)):
        what = _text(table, row, subject)
        if templates is not None and (sentences is None or not _blank(templates[row])):
            text = _from_template(table, row, templates[row], what)
        else:
            assert sentences is not None, "_asked gives one of the two"
            text = _from_sentence(table, row, sentence, sentences[row])
        new = extra["new-answer"][row] if "new-answer" in extra else None
        probes.append(
            Probe(
                subject=what,
                answer=_text(table, row, answer),
                text=text,
                relation="" if relation is None else str(table.columns[relation][row] or ""),
                snippet=str(extra["snippets"][row] or "") if "snippets" in extra else "",
                known=_truth(table, row, columns.known, extra["known"][row])
                if "known" in extra and columns.known is not None
                else None,
                new_answer=None if new in (None, "") else str(new),
                replacement=str(extra["replace-with"][row] or "")
                if "replace-with" in extra
                else "",
                entry=_entry(table, row, columns.entry, extra["entry"][row])
                if "entry" in extra and columns.entry is not None
                else None,
            )
        )
    return probes


def fit(
    trained: TrainedModel,
    probes: Sequence[Probe],
    *,
    skip_unfit: bool = False,
    allowed: Collection[int] | None = None,
) -> Fitted:
    """Turn probes into tokens. An object of several tokens cannot be asked with one mask, nor can a
    sentence with several masks, which LAMA leaves out, too.

    Args:
        allowed: the tokens that may be answered; None: all.

    Raises:
        ConfigError: some do not fit and `skip_unfit` is off, or none is left; says which and why.
    """
    kept: dict[tuple[str, str, str], int] = {}
    chosen: list[Probe] = []
    tokens: list[tuple[int, ...]] = []
    answers: list[tuple[int, int]] = []
    unfit: list[str] = []
    for probe in probes:
        # Facts without a sentence are not each other's repetitions.
        key = (probe.relation, probe.text or probe.subject, probe.answer)
        if key in kept:
            continue
        kept[key] = len(kept)
        try:
            old = answer_token(trained, probe.answer, allowed)
            new = old
            if probe.new_answer is not None:
                new = answer_token(trained, probe.new_answer, allowed)
            if not probe.text:
                raise ConfigError(f"{probe.subject!r} ({probe.answer}) has no masked sentence")
            ids = sentence_ids(trained, probe.text)
        except ConfigError as error:
            unfit.append(str(error))
            continue
        chosen.append(probe)
        tokens.append(ids)
        answers.append((old, new))
    if unfit and not skip_unfit:
        shown = "; ".join(unfit[:_SHOWN])
        more = f"; and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
        raise ConfigError(
            f"{len(unfit)} of {len(kept)} probes cannot be asked of this model: {shown}{more}; "
            "leave such ones out with --skip-unfit"
        )
    if not chosen:
        raise ConfigError("no probe is left that can be asked of this model")
    mask = trained.tokenizer.mask_token_id
    return Fitted(
        probes=tuple(chosen),
        tokens=tuple(tokens),
        positions=tuple(ids.index(mask) for ids in tokens),
        answers=tuple(old for old, _ in answers),
        new_answers=tuple(new for _, new in answers),
        unfit=tuple(unfit),
        repeated=len(probes) - len(kept),
    )


def filled(template: str, subject: str) -> str:
    """A template with the subject in its slot, and a mask for the object."""
    return template.replace(SUBJECT_SLOT, subject).replace(OBJECT_SLOT, MASK)


def check_template(template: str) -> str | None:
    """What is wrong with a template; None: nothing."""
    for slot in (SUBJECT_SLOT, OBJECT_SLOT):
        if template.count(slot) != 1:
            return f"the template {template!r} has {slot} {template.count(slot)} times, not once"
    return None


def column_of(table: Table, names: Sequence[str]) -> str:
    """The first of these columns that a table has. Raises TaskDataError: it has none; names its."""
    for name in names:
        if name in table.columns:
            return name
    raise TaskDataError(
        f"{table.path}: there is no column {' or '.join(names)}; the columns are "
        f"{', '.join(table.columns)}"
    )


def _asked(
    table: Table, sentence: str, prompt: Prompt | None
) -> tuple[list[Any] | None, list[Any] | None]:
    """The columns of templates and of sentences that may be asked; one of them at least."""
    templates = table.columns.get("template") if prompt != "sentence" else None
    sentences = table.columns.get(sentence) if prompt != "template" else None
    if templates is None and sentences is None:
        wanted = {None: f"template or {sentence}", "template": "template", "sentence": sentence}
        raise TaskDataError(
            f"{table.path}: there is no column {wanted[prompt]}; the columns are "
            f"{', '.join(table.columns)}. Give a column `template` with {SUBJECT_SLOT} and "
            f"{OBJECT_SLOT}, or `{sentence}` with {MASK}."
        )
    return templates, sentences


def _blank(value: Any) -> bool:
    return not str("" if value is None else value).strip()


def _from_template(table: Table, row: int, template: Any, subject: str) -> str:
    wrong = check_template(str(template or ""))
    if wrong is not None:
        raise table.fault(row, "template", wrong)
    return filled(str(template), subject)


def _from_sentence(table: Table, row: int, column: str, given: Any) -> str:
    text = " ".join(given) if isinstance(given, list) else str(given or "")
    if text.strip() and MASK not in text:
        raise table.fault(row, column, f"{text!r} has no {MASK}")
    return text if text.strip() else ""  # T-REx has facts without: `fit` tells them


def _text(table: Table, row: int, column: str) -> str:
    value = table.columns[column][row]
    if _blank(value):
        raise table.fault(row, column, "is empty")
    if isinstance(value, bool | list | dict):
        raise table.fault(row, column, f"holds {type(value).__name__}, not text")
    return str(value).strip()


def _truth(table: Table, row: int, column: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no"):
        return False
    raise table.fault(row, column, f"is {value!r}; allowed: true or false")


def _entry(table: Table, row: int, column: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not str(value).isascii() or not str(value).isdigit():
        raise table.fault(row, column, f"is {value!r}; an entry's id is a whole number from 0")
    return int(value)
