"""A step that is not finite is left out by all ranks together; too many end the run, saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.multiprocess.loop_case import STEPS, Fault, Place, exported, lines, numbers
from tests.multiprocess.ranks import run_ranks
from trainer.checkpoint import committed_checkpoints, read_state
from trainer.errors import TrainingError
from trainer.report import write_report
from trainer.settings import TrainSettings

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STAGES = (0, 1, 2, 3)
# On either rank, in every way.
SOME = (Fault(1, 3, "loss"), Fault(1, 5, "query"), Fault(0, 8, "gradient"))
ALONE = tuple(Fault(0, fault.step, fault.what) for fault in SOME)
FROM_4_ON = tuple(Fault(1, step, "loss") for step in range(4, STEPS + 1))


def constant(place: Place, name: str, **options: Any) -> TrainSettings:
    return place.settings(name, refresh="off", dropout=0.0, **options)


def alone(rank: int, place: Place) -> Any:
    return place.run_in_a_fork(constant(place, "alone"), faults=ALONE)


def on_two(rank: int, place: Place) -> dict[str, str]:
    """Runs of two ranks, each in forks of these processes."""
    import deepspeed  # noqa: F401

    told = {}
    for stage in STAGES:
        settings = constant(place, f"zero-{stage}", trainers=2, zero_stage=stage)
        place.run_in_a_fork(settings, rank, faults=SOME)
        many = constant(place, f"many-{stage}", trainers=2, zero_stage=stage)
        try:
            place.run_in_a_fork(many, rank, faults=FROM_4_ON)
        except TrainingError as error:
            told[f"many-{stage}"] = str(error)
    resumed = constant(place, "many-2", trainers=2, zero_stage=2)
    told["resumed"] = str(place.run_in_a_fork(resumed, rank, resume=True).step)
    return told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place.make(tmp_path_factory.mktemp("loop"))
    for stage in STAGES:
        for name in ("zero", "many"):
            (place.home / f"{name}-{stage}").mkdir()
    return place


@pytest.fixture(scope="module")
def told(place: Place) -> list[dict[str, str]]:
    run_ranks(alone, 1, place, timeout_s=240, process_group=False)
    return run_ranks(on_two, 2, place, timeout_s=400, process_group=False)


every_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.mark.usefixtures("told")
@every_stage
def test_training_goes_on_without_the_steps_that_were_not_finite(place: Place, stage: int) -> None:
    """Two ranks, one of them at fault, are one rank that had the same faults."""
    name = f"zero-{stage}"
    left_out = [line["step"] for line in lines(place, name) if line.get("skipped_steps")]
    assert left_out == [3, 5, 8]
    for line in lines(place, name):
        assert ("loss" in line) == (line["step"] not in left_out)
    sound = numbers_of_sound(place, name)
    assert len(sound) == STEPS - 3
    for given, expected in zip(sound, numbers_of_sound(place, "alone"), strict=True):
        assert given == pytest.approx(expected, abs=2e-5, rel=1e-4)
    wanted = exported(place, "alone")
    for key, value in exported(place, name).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-4)


def numbers_of_sound(place: Place, name: str) -> list[list[float]]:
    keys = ("step", "loss", "grad_norm", "lr")
    return [[line[key] for key in keys] for line in lines(place, name) if "loss" in line]


@pytest.mark.usefixtures("told")
@every_stage
def test_what_was_left_out_is_told(place: Place, stage: int) -> None:
    messages = [line["message"] for line in lines(place, f"zero-{stage}", "event")]
    first, second, third = messages
    assert first.startswith("step 3 is left out on all ranks: its loss (rank 1) is not finite")
    assert second.startswith("step 5 is left out on all ranks: its loss (rank 1) is not finite")
    assert third.startswith("step 8 is left out on all ranks: its gradient is not finite")
    assert "3 in all" in third
    page = write_report(place.home / f"zero-{stage}").read_text()
    assert "3 steps left out" in page


@every_stage
def test_too_many_in_a_row_end_the_run_with_its_state_saved(
    place: Place, told: list[dict[str, str]], stage: int
) -> None:
    """Steps 4 to 7: the limit is 3 in a row."""
    for own in told:
        message = own[f"many-{stage}"]
        for part in ("4 steps in a row", "optim.max_skipped_steps = 3", "saved as step-00000007"):
            assert part in message
    last = committed_checkpoints(place.home / f"many-{stage}")[-1]
    state = read_state(last)
    if stage != 2:  # that one was resumed
        assert state.step == 7
        assert state.engine["skipped_steps"] == 4


def test_what_was_saved_goes_on(place: Place, told: list[dict[str, str]]) -> None:
    assert [own["resumed"] for own in told] == [str(STEPS), str(STEPS)]
    recorded = numbers(place, "many-2", "lr")
    assert [step for step, _ in recorded] == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in lines(place, "many-2") if line["step"] > 7]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
