"""Probes in LAMA's format: read from a file, and fitted to a model's tokenizer.

A probe is a fact and a sentence in which its object is masked: `template` with [X] for the subject
and [Y] for the object, or a ready `masked_sentence`. Source: Petroni et al., 2019,
https://arxiv.org/abs/1909.01066.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import ConfigError
from cluster.memory_tools import MASK
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
    """

    snippet: str | None = None
    known: str | None = None
    new_answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One fact; `text` holds [MASK] once. `new_answer` is what an edit makes of `answer`."""

    subject: str
    answer: str
    text: str
    relation: str = ""
    snippet: str = ""
    known: bool | None = None
    new_answer: str | None = None


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
        prompt: what to ask with; None: the template where the file has one.
        columns: which further columns to read.

    Raises:
        TaskDataError: no such file, no rows, a missing column, a template without its slots, a
            sentence without [MASK]; names the row.
    """
    columns = columns or Columns()
    table = read_table(path, "the probes")
    subject, answer = _column(table, SUBJECTS), _column(table, ANSWERS)
    relation = next((name for name in RELATIONS if name in table.columns), None)
    sentence = next((name for name in SENTENCES if name in table.columns), SENTENCES[0])
    if prompt is None:
        prompt = "template" if "template" in table.columns else "sentence"
    asked = table.column("template" if prompt == "template" else sentence, "--prompt")
    extra = {
        option: table.column(name, f"--{option}")
        for option, name in (
            ("snippets", columns.snippet),
            ("known", columns.known),
            ("new-answer", columns.new_answer),
        )
        if name is not None
    }
    probes = []
    for row in range(len(table)):
        what = _text(table, row, subject)
        if prompt == "template":
            text = _from_template(table, row, asked[row], what)
        else:
            text = _from_sentence(table, row, sentence, asked[row])
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
            )
        )
    return probes


def fit(trained: TrainedModel, probes: Sequence[Probe], *, skip_unfit: bool = False) -> Fitted:
    """Turn probes into tokens. An object of several tokens cannot be asked with one mask, nor can a
    sentence with several masks, which LAMA leaves out, too.

    Raises:
        ConfigError: some do not fit and `skip_unfit` is off, or none is left; says which and why.
    """
    kept: dict[tuple[str, str, str], int] = {}
    chosen: list[Probe] = []
    tokens: list[tuple[int, ...]] = []
    answers: list[tuple[int, int]] = []
    unfit: list[str] = []
    for probe in probes:
        key = (probe.relation, probe.text, probe.answer)
        if key in kept:
            continue
        kept[key] = len(kept)
        try:
            old = _one_token(trained, probe.answer)
            new = old if probe.new_answer is None else _one_token(trained, probe.new_answer)
            ids = _sentence(trained, probe.text)
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


def _from_template(table: Table, row: int, template: Any, subject: str) -> str:
    wrong = check_template(str(template or ""))
    if wrong is not None:
        raise table.fault(row, "template", wrong)
    return filled(str(template), subject)


def _from_sentence(table: Table, row: int, column: str, given: Any) -> str:
    text = " ".join(given) if isinstance(given, list) else str(given or "")
    if MASK not in text:
        raise table.fault(row, column, f"{text!r} has no {MASK}")
    return text


def _column(table: Table, names: Sequence[str]) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise TaskDataError(
        f"{table.path}: there is no column {' or '.join(names)}; the columns are "
        f"{', '.join(table.columns)}"
    )


def _text(table: Table, row: int, column: str) -> str:
    value = table.columns[column][row]
    if value is None or not str(value).strip():
        raise table.fault(row, column, "is empty")
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


def _one_token(trained: TrainedModel, answer: str) -> int:
    # With a space before it, as a word in a sentence has one: some tokenizers tell the two apart.
    for text in (f" {answer}", answer):
        ids = trained.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) == 1:
            return int(ids[0])
    raise ConfigError(f"the object {answer!r} is {len(ids)} tokens, and a mask stands for one")


def _sentence(trained: TrainedModel, text: str) -> tuple[int, ...]:
    tokenizer = trained.tokenizer
    given = text.replace(MASK, tokenizer.mask_token)
    ids = tokenizer(given, add_special_tokens=False, verbose=False).input_ids
    if len(ids) + 2 > trained.max_positions:
        raise ConfigError(
            f"{text[:60]!r}... has {len(ids)} tokens, and the model reads "
            f"{trained.max_positions - 2}"
        )
    if ids.count(tokenizer.mask_token_id) != 1:
        raise ConfigError(f"{text[:60]!r}... has {ids.count(tokenizer.mask_token_id)} masks, not 1")
    return (int(tokenizer.cls_token_id), *ids, int(tokenizer.sep_token_id))
