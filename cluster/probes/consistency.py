"""Whether a model answers alike however a fact is put.

After ParaRel (Elazar et al., 2021, https://arxiv.org/abs/2102.01017): every fact is asked with all
patterns of its relation, and may be answered with the objects of its relation's facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from cluster.probes.reading import Probe, check_template, filled, fit
from cluster.probes.scoring import Answered, ask
from cluster.trained_model import TrainedModel
from memory_server.api import Memory
from trainer.finetune.errors import TaskDataError
from trainer.finetune.tables import read_table

_PATTERNS = ("template", "pattern")


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Means over `facts` that have at least two patterns.

    Attributes:
        consistency: share of the pairs of patterns that get the same answer.
        accuracy: share of the answers that are right.
        all_right: share of the facts that every pattern gets right.
        when_right: consistency of the facts whose first pattern is answered right; None: no such.
    """

    facts: int
    patterns: int
    consistency: float
    accuracy: float
    all_right: float
    when_right: float | None


def read_patterns(path: Path | str) -> dict[str, list[str]]:
    """Templates by relation, in the file's order: columns relation, and template or pattern.

    Raises:
        TaskDataError: as `read_probes`.
    """
    table = read_table(path, "--patterns")
    relations = table.column("relation", "--patterns")
    column = next((name for name in _PATTERNS if name in table.columns), _PATTERNS[0])
    found: dict[str, list[str]] = {}
    for row, template in enumerate(table.column(column, "--patterns")):
        wrong = check_template(str(template or ""))
        if wrong is not None:
            raise table.fault(row, column, wrong)
        found.setdefault(str(relations[row]), []).append(str(template))
    return found


def consistency(
    trained: TrainedModel,
    memory: Memory | None,
    probes: Sequence[Probe],
    patterns: Mapping[str, Sequence[str]],
    *,
    k: int,
    skip_unfit: bool,
) -> Consistency:
    """Ask every fact in every way.

    Raises:
        ConfigError: probes that cannot be asked. TaskDataError: no relation of the probes has two
            patterns.
    """
    facts = dict.fromkeys((probe.relation, probe.subject, probe.answer) for probe in probes)
    asked_of: dict[str, list[tuple[str, str]]] = {}
    for relation, subject, answer in facts:
        if len(patterns.get(relation, ())) > 1:
            asked_of.setdefault(relation, []).append((subject, answer))
    if not asked_of:
        known = ", ".join(sorted({relation for relation, _, _ in facts})) or "none"
        raise TaskDataError(
            f"no relation of the probes ({known}) has two patterns; --patterns needs a column "
            "`relation` with the same names"
        )
    results: list[list[Answered]] = []
    rights: list[int] = []
    for relation, pairs in asked_of.items():
        texts = [
            Probe(subject=s, answer=a, text=filled(pattern, s), relation=f"{number}")
            for s, a in pairs
            for number, pattern in enumerate(patterns[relation])
        ]
        fitted = fit(trained, texts, skip_unfit=skip_unfit)
        answers = ask(trained, memory, fitted, k=k, candidates=fitted.answers)
        of_fact: dict[tuple[str, str], list[Answered]] = {}
        truths: dict[tuple[str, str], int] = {}
        for probe, given, right in zip(fitted.probes, answers, fitted.answers, strict=True):
            of_fact.setdefault((probe.subject, probe.answer), []).append(given)
            truths[probe.subject, probe.answer] = right
        for fact, told in of_fact.items():
            if len(told) > 1:
                results.append(told)
                rights.append(truths[fact])
    if not results:
        raise TaskDataError("no fact can be asked in two of its relation's patterns")
    return summed(
        [[answer.top for answer in given] for given in results],
        rights,
        patterns=sum(len(patterns[relation]) for relation in asked_of),
    )


def summed(tops: Sequence[Sequence[int]], rights: Sequence[int], *, patterns: int) -> Consistency:
    """The measures of given answers.

    Args:
        tops: of each fact, the answer to each pattern.
        rights: of each fact, the right answer.
    """
    same = [fmean(a == b for a, b in combinations(given, 2)) for given in tops]
    right = [[top == truth for top in given] for given, truth in zip(tops, rights, strict=True)]
    when_right = [s for s, given in zip(same, right, strict=True) if given[0]]
    made = Consistency(
        facts=len(tops),
        patterns=patterns,
        consistency=fmean(same),
        accuracy=fmean(fmean(given) for given in right),
        all_right=fmean(all(given) for given in right),
        when_right=None,
    )
    return replace(made, when_right=fmean(when_right)) if when_right else made
