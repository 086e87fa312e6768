"""A run that changes its trainers and its ZeRO stage on the way is the run that did not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.loop_case import STEPS, Place, StopAfter, exported, lines, numbers
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.shared_memory import OtherRanksMemory, serve
from trainer.checkpoint import committed_checkpoints, read_state
from trainer.control import Control
from trainer.data.cursor import Cursor
from trainer.data.stream import TrainBatch
from trainer.job import TrainOutcome
from trainer.loop import run_rank
from trainer.settings import TrainSettings
from trainer.task import Stream

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@dataclass(frozen=True)
class NotingTask:
    """A task that writes down which sequences each rank was handed in which step."""

    task: Any
    notes: Path

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor, step: int = 0
    ) -> Stream:
        stream = self.task.open(
            settings, rank=rank, world_size=world_size, cursor=cursor, step=step
        )
        return NotingStream(stream, self.notes / f"{cursor.epoch}-{rank}.jsonl")

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        found: Iterator[TrainBatch] = self.task.heldout(settings, rank=rank, world_size=world_size)
        return found

    def content_version(self, step: int) -> str | None:
        version: str | None = self.task.content_version(step)
        return version


class NotingStream(Iterator[list[TrainBatch]]):
    def __init__(self, stream: Stream, notes: Path) -> None:
        self._stream, self._notes = stream, notes

    @property
    def cursor(self) -> Cursor:
        return self._stream.cursor

    def __next__(self) -> list[TrainBatch]:
        step = self._stream.cursor.epoch
        batches = next(self._stream)
        ids = [int(i) for batch in batches for i in batch.positive_ids]
        with self._notes.open("a") as file:
            file.write(json.dumps({"step": step, "ids": ids}) + "\n")
        return batches

    def close(self) -> None:
        self._stream.close()


def run(
    rank: int, place: Place, name: str, ranks: int, stage: int, stop_after: int, resume: bool
) -> TrainOutcome:
    """One phase, with one memory for all ranks and keys that training waits for."""
    settings = place.settings(name, trainers=ranks, zero_stage=stage, dropout=0.0, warmup=0)
    address = Path(settings.run.dir) / f".memory-{ranks}"
    memory: Any = None if rank == 0 else OtherRanksMemory(address)
    job = place.job(settings, resume=resume, memory=memory)
    if rank == 0:
        serve(job.memory, address)
    notes = Path(settings.run.dir) / "notes"
    notes.mkdir(exist_ok=True)
    object.__setattr__(job, "task", NotingTask(job.task, notes))
    control = StopAfter(stop_after) if stop_after and rank == 0 else Control()
    return run_rank(job, rank, control)


PHASES = ((2, 0, 3), (1, 3, 6), (4, 1, 0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Step 3 is before the first refresh, step 6 between two, step 8 has one."""
    place = Place.make(tmp_path_factory.mktemp("loop"))
    for name, phases in (("whole", ((1, 2, 0),)), ("changing", PHASES)):
        (place.home / name).mkdir()
        for number, (ranks, stage, stop_after) in enumerate(phases):
            words = (place, name, ranks, stage, stop_after, number > 0)
            outcomes = run_ranks(run, ranks, *words, timeout_s=240, process_group=False)
            assert {outcome.step for outcome in outcomes} == {stop_after or STEPS}
    return place


def test_every_step_equals_the_uninterrupted_runs(place: Place) -> None:
    keys = ("loss", "mlm_loss", "mlm_accuracy", "grad_norm", "lr", "staleness_steps")
    wanted = numbers(place, "whole", *keys)
    assert len(wanted) == STEPS
    for given, expected in zip(numbers(place, "changing", *keys), wanted, strict=True):
        assert given == pytest.approx(expected, abs=2e-5, rel=1e-4)


def test_the_model_ends_as_the_uninterrupted_runs(place: Place) -> None:
    wanted = exported(place, "whole")
    for key, value in exported(place, "changing").items():
        assert (value - wanted[key]).abs().max() < 1e-4, key


def test_every_sequence_is_seen_exactly_once(place: Place) -> None:
    seen: dict[str, dict[int, list[int]]] = {}
    for name in ("whole", "changing"):
        by_step = seen.setdefault(name, {})
        for path in (place.home / name / "notes").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                note = json.loads(line)
                by_step.setdefault(note["step"], []).extend(note["ids"])
    assert seen["whole"].keys() == seen["changing"].keys() == set(range(STEPS))
    for step, ids in seen["whole"].items():
        assert sorted(seen["changing"][step]) == sorted(ids), step


def test_keys_and_content_are_those_that_were_recorded(place: Place) -> None:
    """Refreshes come at the same steps, with keys of the same weights."""
    refreshes = [
        [(line["step"], line["encoder_step"]) for line in lines(place, name, "refresh")]
        for name in ("whole", "changing")
    ]
    assert refreshes[0] == refreshes[1] == [(4, 4), (8, 8), (STEPS, STEPS)]
    last = [read_state(committed_checkpoints(place.home / n)[-1]) for n in ("whole", "changing")]
    assert last[0].content_version == last[1].content_version
    assert [state.trainers for state in last] == [1, 4]
