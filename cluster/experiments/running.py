"""Running an experiment's stages; what is finished is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.experiments.plan import Experiment, Stage
from cluster.experiments.selecting import select
from trainer.export import write_json

_PLUGLM = (sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main())")
_TOLD = 2000  # last characters of a failed command's output

Chain = list[tuple[Stage, int | None]]
"""Stages, each with its seed, of which each may need those before it."""


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


def run_experiment(place: Place, *, again: bool, say: Callable[[str], None], jobs: int = 1) -> None:
    """Run every stage that is not finished, in order; blocks.

    Args:
        again: run stages again whose settings have changed since, and all that come after them.
        jobs: so many seeds at a time; each has its share of the machine's threads.

    Raises:
        ConfigError: a finished stage was run with other settings, or a stage uses a slot that is
            not known; before anything is run. StageFailed: of the first that failed; what ran
            beside it is finished and kept, and nothing more is begun.
    """
    groups = _groups(place.experiment.stages, place.experiment.seeds)
    steps = [step for group in groups for chain in group for step in chain]
    for stage, seed in steps:
        slots = place.slots(seed)
        for word in stage.run:
            place.experiment.filled(word, slots)
    place.out.mkdir(parents=True, exist_ok=True)
    finished = {
        (stage.name, seed): _finished(place, stage, seed, again=again) for stage, seed in steps
    }
    environment = dict(os.environ)
    if jobs > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    failed = threading.Event()

    def run_chain(chain: Chain, stale: bool) -> bool:
        for stage, seed in chain:
            if failed.is_set():
                break
            who = stage.name if seed is None else f"{stage.name}, seed {seed}"
            if finished[stage.name, seed] and not stale:
                say(f"{who}: finished before")
                continue
            stale = stale or (again and place.record(stage, seed).exists())
            say(f"{who} ...")
            try:
                took = _run_and_record(place, stage, seed, environment)
            except Exception:
                failed.set()
                raise
            say(f"{who}: {took} s")
        return stale

    stale = False
    for group in groups:
        if jobs == 1 or len(group) == 1:
            done = [run_chain(chain, stale) for chain in group]
        else:
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                try:
                    done = list(pool.map(run_chain, group, [stale] * len(group)))
                except BaseException:  # an interrupt, too: nothing more is begun
                    failed.set()
                    raise
        stale = any(done)


def _run_and_record(
    place: Place, stage: Stage, seed: int | None, environment: Mapping[str, str]
) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    result = _run(place, stage, seed, environment)
    seconds = round(time.monotonic() - began, 1)
    path = place.record(stage, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "stage": stage.name,
            "settings": _settings(place, stage, seed),
            "seconds": seconds,
            "result": result,
        },
    )
    return seconds


def stage_result(place: Place, stage: str, seed: int) -> Any:
    """What a finished stage printed. Raises KeyError: there is none."""
    for each in place.experiment.stages:
        if each.name == stage:
            return json.loads(place.record(each, seed).read_text(encoding="utf-8"))["result"]
    raise KeyError(stage)


def _groups(stages: tuple[Stage, ...], seeds: tuple[int, ...]) -> list[list[Chain]]:
    """What follows on each other, each a list of chains that do not need one another.

    Stages of a seed that follow on each other are a chain, so that the first seed's results are
    there early; any other stage is a group by itself.
    """
    groups: list[list[Chain]] = []
    for per_seed, some in groupby(stages, key=lambda stage: stage.per_seed):
        together = list(some)
        if per_seed:
            groups.append([[(stage, seed) for stage in together] for seed in seeds])
        else:
            groups.extend([[(stage, None)]] for stage in together)
    return groups


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


def _run(place: Place, stage: Stage, seed: int | None, environment: Mapping[str, str]) -> Any:
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
            [*_PLUGLM, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
            env=dict(environment),
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
