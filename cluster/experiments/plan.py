"""An experiment's TOML file: what is run, for which seeds, and what is read from it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_SLOT = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")
GIVEN = ("data", "out", "seed", "here")
"""Slots that every experiment has: the data's directory, the experiment's own, the seed, and the
directory of the TOML file."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step: a `pluglm` command, or rows that are chosen from a table.

    Attributes:
        run: the words of a `pluglm` command; slots such as {out} are filled.
        select: rows of a Parquet file that become JSON Lines: see `selecting.Selection`.
        per_seed: run once for each seed; otherwise once.
        json: keep what the command prints, JSON, as the stage's result.
    """

    name: str
    run: tuple[str, ...] = ()
    select: Mapping[str, Any] | None = None
    per_seed: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number for each seed.

    Attributes:
        at: where it is in a stage's result, such as ("update", "stages", "after", "mrr").
        mean_of: or the measures, named before it, whose mean it is: a score over several tasks.
    """

    name: str
    at: tuple[str, ...] = ()
    mean_of: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A claim: a measure is larger than another one, seed by seed."""

    name: str
    larger: str
    smaller: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a file says."""

    name: str
    description: str
    seeds: tuple[int, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    measures: tuple[Measure, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def filled(self, text: str, slots: Mapping[str, str]) -> str:
        """A text with its slots filled; {{name}} is told as {name}.

        Raises:
            ConfigError: an unknown slot.
        """

        def value(match: re.Match[str]) -> str:
            kept, name = match.groups()
            if kept:
                return f"{{{kept}}}"
            if name not in slots:
                raise ConfigError(
                    f"the experiment {self.name} uses {{{name}}} in {text!r}; known are "
                    f"{', '.join(sorted(slots))}; {{{{{name}}}}} is told as {{{name}}}"
                )
            return slots[name]

        return _SLOT.sub(value, text)


def read_experiment(path: Path, variables: Mapping[str, str] | None = None) -> Experiment:
    """Read and check a file.

    Args:
        variables: values that replace the file's own.

    Raises:
        ConfigError: names what is wrong. FileNotFoundError.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no TOML: not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from error
    allowed = {"description", "seeds", "variables", "stage", "measure", "comparison"}
    _refuse_unknown(path, raw, allowed)
    seeds = raw.get("seeds", [0, 1, 2])
    if (
        not seeds
        or not all(type(s) is int and s >= 0 for s in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ConfigError(f"{path}: seeds = {seeds}: must be different whole numbers from 0")
    known = {name: str(value) for name, value in raw.get("variables", {}).items()}
    for name in variables or {}:
        if name not in known:
            raise ConfigError(
                f"--set {name}: {path} has no such variable; it has {', '.join(known) or 'none'}"
            )
    made = Experiment(
        name=path.stem,
        description=str(raw.get("description", "")),
        seeds=tuple(seeds),
        variables=known | dict(variables or {}),
        stages=tuple(_stage(path, each) for each in raw.get("stage", [])),
        measures=tuple(
            _measure(each)
            for each in _each(path, raw, "measure", {"name", "at"}, {"name", "mean_of"})
        ),
        comparisons=tuple(
            Comparison(**{key: str(value) for key, value in each.items()})
            for each in _each(path, raw, "comparison", {"name", "larger", "smaller"})
        ),
    )
    _check(path, made)
    return made


def _stage(path: Path, raw: Mapping[str, Any]) -> Stage:
    name = str(raw.get("name", ""))
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: a stage is named {name!r}; use lower-case letters, digits and -"
        )
    _refuse_unknown(path, raw, {each.name for each in fields(Stage)})
    if ("run" in raw) == ("select" in raw):
        raise ConfigError(f"{path}: the stage {name} must have either run or select")
    return Stage(
        name=name,
        run=tuple(str(word) for word in raw.get("run", ())),
        select=raw.get("select"),
        per_seed=bool(raw.get("per_seed", False)),
        json=bool(raw.get("json", False)),
    )


def _measure(raw: Mapping[str, Any]) -> Measure:
    name = str(raw["name"])
    if "at" in raw:
        return Measure(name=name, at=tuple(str(raw["at"]).split("/")))
    return Measure(name=name, mean_of=tuple(str(each) for each in raw["mean_of"]))


def _each(
    path: Path, raw: Mapping[str, Any], section: str, *keys: set[str]
) -> Sequence[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = raw.get(section, [])
    for each in found:
        if set(each) not in keys:
            raise ConfigError(
                f"{path}: a [[{section}]] has {', '.join(sorted(each))}; it must have "
                f"{', or '.join(', '.join(sorted(allowed)) for allowed in keys)}"
            )
    return found


def _refuse_unknown(path: Path, raw: Mapping[str, Any], allowed: set[str]) -> None:
    for key in raw:
        if key not in allowed:
            raise ConfigError(f"{path}: unknown key {key!r}; allowed: {', '.join(sorted(allowed))}")


def _check(path: Path, made: Experiment) -> None:
    names = [stage.name for stage in made.stages]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{path}: stages must be there and have different names, got {names}")
    told = {stage.name for stage in made.stages if stage.json and stage.per_seed}
    before: set[str] = set()
    for measure in made.measures:
        strange = set(measure.mean_of) - before
        if strange or not (measure.at or measure.mean_of):
            raise ConfigError(
                f"{path}: the measure {measure.name!r} is the mean of {sorted(strange) or 'none'}; "
                f"measures that are told before it: {', '.join(sorted(before)) or 'none'}"
            )
        before.add(measure.name)
        if measure.at and measure.at[0] not in told:
            raise ConfigError(
                f"{path}: the measure {measure.name!r} reads the stage {measure.at[0]!r}; stages "
                f"whose JSON is kept for each seed: {', '.join(sorted(told)) or 'none'}"
            )
    measures = {measure.name for measure in made.measures}
    for comparison in made.comparisons:
        for name in (comparison.larger, comparison.smaller):
            if name not in measures:
                raise ConfigError(
                    f"{path}: the comparison {comparison.name!r} names {name!r}; measures: "
                    f"{', '.join(sorted(measures)) or 'none'}"
                )
