"""Running an experiment's stages; what is finished is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.experiments.plan import Experiment, Stage
from cluster.experiments.selecting import select
from trainer.export import write_json

_PLUGLM = (sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main())")
_TOLD = 2000  # last characters of a failed command's output


class StageFailed(Exception):
    """A stage's command failed; the message ends with what it said."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an experiment's data and results lie."""

    experiment: Experiment
    here: Path
    data: Path
    out: Path

    def slots(self, seed: int | None) -> dict[str, str]:
        """What the slots of a stage's words stand for."""
        given = {"here": str(self.here), "data": str(self.data), "out": str(self.out)}
        if seed is not None:
            given["seed"] = str(seed)
        filled = {
            name: self.experiment.filled(value, given)
            for name, value in self.experiment.variables.items()
        }
        return filled | given

    def record(self, stage: Stage, seed: int | None) -> Path:
        """The file that says that a stage is finished, and what it gave."""
        folder = self.out / "stages" if seed is None else self.out / f"seed-{seed}" / "stages"
        return folder / f"{stage.name}.json"


def run_experiment(place: Place, *, again: bool, say: Callable[[str], None]) -> None:
    """Run every stage that is not finished, in order; blocks.

    Args:
        again: run stages again whose settings have changed since, and all that come after them.

    Raises:
        ConfigError: a finished stage was run with other settings, or a stage uses a slot that is
            not known; before anything is run. StageFailed.
    """
    for stage, seed in _all(place.experiment.stages, place.experiment.seeds):
        slots = place.slots(seed)
        for word in stage.run:
            place.experiment.filled(word, slots)
    place.out.mkdir(parents=True, exist_ok=True)
    seeds = place.experiment.seeds
    done = [
        (stage, seed, _finished(place, stage, seed, again=again))
        for stage, seed in _all(place.experiment.stages, seeds)
    ]
    stale = False
    for stage, seed, finished in done:
        who = stage.name if seed is None else f"{stage.name}, seed {seed}"
        if finished and not stale:
            say(f"{who}: finished before")
            continue
        stale = stale or (again and place.record(stage, seed).exists())
        say(f"{who} ...")
        began = time.monotonic()
        result = _run(place, stage, seed)
        record = {
            "stage": stage.name,
            "settings": _settings(place, stage, seed),
            "seconds": round(time.monotonic() - began, 1),
            "result": result,
        }
        path = place.record(stage, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        say(f"{who}: {record['seconds']} s")


def stage_result(place: Place, stage: str, seed: int) -> Any:
    """What a finished stage printed. Raises KeyError: there is none."""
    for each in place.experiment.stages:
        if each.name == stage:
            return json.loads(place.record(each, seed).read_text(encoding="utf-8"))["result"]
    raise KeyError(stage)


def _all(stages: tuple[Stage, ...], seeds: tuple[int, ...]) -> Iterator[tuple[Stage, int | None]]:
    """Stages in order; those of a seed one after the other, seed by seed, where they follow on each
    other, so that the first seed's results are there early."""
    start = 0
    while start < len(stages):
        if not stages[start].per_seed:
            yield stages[start], None
            start += 1
            continue
        end = start
        while end < len(stages) and stages[end].per_seed:
            end += 1
        for seed in seeds:
            for stage in stages[start:end]:
                yield stage, seed
        start = end


def _settings(place: Place, stage: Stage, seed: int | None) -> dict[str, Any]:
    """What decides a stage's result; places are left out, as they may move."""
    slots = {name: f"{{{name}}}" for name in ("here", "data", "out")}
    slots |= dict(place.experiment.variables.items())
    if seed is not None:
        slots["seed"] = str(seed)
    words = [place.experiment.filled(word, slots) for word in stage.run]
    return {"run": words, "select": None if stage.select is None else dict(stage.select)}


def _finished(place: Place, stage: Stage, seed: int | None, *, again: bool) -> bool:
    path = place.record(stage, seed)
    if not path.exists():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if before == _settings(place, stage, seed):
        return True
    if again:
        return False
    raise ConfigError(
        f"the stage {stage.name} of {place.out} was run with other settings; run it and all that "
        "follows again with --again, or choose another directory with --out"
    )


def _run(place: Place, stage: Stage, seed: int | None) -> Any:
    slots = place.slots(seed)

    def fill(text: str) -> str:
        return place.experiment.filled(text, slots)

    if stage.select is not None:
        return {"rows": select(stage.select, fill)}
    words = [fill(word) for word in stage.run]
    log = place.record(stage, seed).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        done = subprocess.run(
            [*_PLUGLM, *words], stdout=subprocess.PIPE, stderr=errors, check=False
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-_TOLD:]
        raise StageFailed(
            f"`pluglm {' '.join(words)}` ended with exit code {done.returncode}; {log} ends:\n"
            f"{said}"
        )
    if not stage.json:
        return None
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise StageFailed(f"`pluglm {' '.join(words)}` printed no JSON ({error})") from error


def number_at(result: Any, path: tuple[str, ...]) -> float:
    """A number in a result; the parts of a list are told by their place, from 0.

    Raises:
        ConfigError: there is no number there.
    """
    found = result
    for name in path:
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
            continue
        if not isinstance(found, Mapping) or name not in found:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else repr(found)
            raise ConfigError(
                f"there is no {'/'.join(path)!r} in the result: at {name!r} is {names}"
            )
        found = found[name]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"{'/'.join(path)!r} of the result is {found!r}, not a number")
    return float(found)
