"""A whole run: the same numbers however it is cut over ranks, passes, stops and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model import PlugLMForMaskedLM
from tests.multiprocess.loop_case import STEPS, Place, exported, lines, numbers
from tests.multiprocess.ranks import run_ranks
from trainer.checkpoint import checkpoint_path, read_state
from trainer.corpus.tokenizer import load_tokenizer
from trainer.errors import CheckpointError, TrainingError
from trainer.job import TrainOutcome
from trainer.metrics import read_metrics
from trainer.settings import TrainSettings
from trainer.world.tokenizer import VOCABULARY

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def run_alone(rank: int, place: Place) -> dict[str, Any]:
    """The runs of one rank, each in a fork of this process."""
    import deepspeed  # noqa: F401

    told: dict[str, Any] = {"whole": place.run_in_a_fork(place.settings("whole"))}
    # The same run, whose process dies after the checkpoint of step 5.
    whole, cut = place.home / "whole", place.home / "cut"
    cut.mkdir()
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")
    shutil.copytree(checkpoint_path(whole, 5), checkpoint_path(cut, 5))
    told["cut"] = place.run_in_a_fork(place.settings("cut"), resume=True)
    stopping = place.settings("stopped")
    told["stopped"] = place.run_in_a_fork(stopping, stop_after=4)
    told["exported when stopped"] = (place.home / "stopped" / "model").exists()
    told["resumed"] = place.run_in_a_fork(stopping, resume=True)
    told["constant"] = place.run_in_a_fork(constant(place, "constant"))
    told["two passes"] = place.run_in_a_fork(constant(place, "two-passes", passes=2))
    for name, settings in (
        ("diverged", place.settings("diverged", lr=1e30)),
        ("no room", place.settings("no-room")),
    ):
        Path(settings.run.dir).mkdir()
        if name == "no room":
            # Whoever runs the tests: nothing can be written below a file.
            (Path(settings.run.dir) / "checkpoints").write_text("")
        try:
            place.run_in_a_fork(settings)
        except (TrainingError, CheckpointError) as error:
            told[name] = error
    return told


def run_on_two(rank: int, place: Place) -> TrainOutcome:
    return place.run(constant(place, "two-ranks", trainers=2, zero_stage=3), rank)


def constant(place: Place, name: str, **options: Any) -> TrainSettings:
    return place.settings(name, refresh="off", dropout=0.0, evaluate_every=5, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def told(place: Place) -> dict[str, Any]:
    """How the runs of one rank ended; one process for all tests, which only look."""
    result: dict[str, Any] = run_ranks(run_alone, 1, place, timeout_s=240, process_group=False)[0]
    return result


def test_a_run_ends_with_a_checkpoint_and_a_model(place: Place, told: dict[str, Any]) -> None:
    outcome = told["whole"]
    assert (outcome.step, outcome.stopped) == (STEPS, False)
    assert outcome.checkpoint == checkpoint_path(place.home / "whole", STEPS)
    assert read_state(outcome.checkpoint).step == STEPS
    model = PlugLMForMaskedLM.from_pretrained(place.home / "whole" / "model")
    assert model.config.vocab_size == len(VOCABULARY)
    assert len(load_tokenizer(place.home / "whole" / "model")) == len(VOCABULARY)


@pytest.mark.usefixtures("told")
def test_every_step_is_on_record(place: Place) -> None:
    recorded = lines(place, "whole")
    assert [line["step"] for line in recorded] == list(range(1, STEPS + 1))
    for line in recorded:
        for key in ("loss", "mlm_loss", "retrieval_loss", "grad_norm", "sequences_per_s"):
            assert line[key] > 0, key
        assert 0 <= line["right_entry_rate"] <= 1
    assert [line["staleness_steps"] for line in recorded] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert [line["encoder_step"] for line in lines(place, "whole", "refresh")] == [4, 8, STEPS]
    assert [line["step"] for line in lines(place, "whole", "checkpoint")] == [5, STEPS]


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("name", ["cut", "stopped"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(place: Place, name: str) -> None:
    """With dropout, and with new keys and new facts on the way."""
    keys = ("loss", "mlm_loss", "retrieval_loss", "grad_norm", "lr", "staleness_steps")
    assert numbers(place, name, *keys) == numbers(place, "whole", *keys)
    wanted = exported(place, "whole")
    for key, value in exported(place, name).items():
        assert torch.equal(value, wanted[key]), key


def test_a_wish_to_stop_writes_a_checkpoint_and_no_model(
    place: Place, told: dict[str, Any]
) -> None:
    outcome = told["stopped"]
    assert (outcome.step, outcome.stopped) == (4, True)
    assert outcome.checkpoint == checkpoint_path(place.home / "stopped", 4)
    assert told["exported when stopped"] is False
    assert (told["resumed"].step, told["resumed"].stopped) == (STEPS, False)


def test_training_that_diverges_ends_with_what_to_do(told: dict[str, Any]) -> None:
    assert isinstance(told["diverged"], TrainingError)
    assert "not finite" in str(told["diverged"])
    assert "lower optim.lr" in str(told["diverged"])


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_last_one_ends_the_run(
    place: Place, told: dict[str, Any]
) -> None:
    error = told["no room"]
    assert isinstance(error, CheckpointError)
    events = read_metrics(place.home / "no-room" / "metrics.jsonl")
    event = next(line for line in events if line["kind"] == "event")
    assert event["step"] == 5
    assert "the checkpoint of step 5 could not be written" in event["message"]
    assert "training goes on" in event["message"]
    for part in ("step 10", str(place.home / "no-room"), "MiB free", "resume with --resume"):
        assert part in str(error)


@pytest.mark.usefixtures("told")
def test_numbers_do_not_hang_on_passes_or_ranks(place: Place) -> None:
    (place.home / "two-ranks").mkdir()
    outcomes = run_ranks(run_on_two, 2, place, timeout_s=180, process_group=False)
    assert [outcome.step for outcome in outcomes] == [STEPS, STEPS]
    keys = ("loss", "mlm_accuracy", "grad_norm", "lr", "right_entry_rate")
    wanted = numbers(place, "constant", *keys)
    held = numbers(place, "constant", "loss", "loss_without_memory", kind="eval")
    assert [step for step, *_ in held] == [5, 10]
    for name in ("two-passes", "two-ranks"):
        for given, expected in zip(numbers(place, name, *keys), wanted, strict=True):
            assert given == pytest.approx(expected, abs=2e-5, rel=1e-4)
        given_held = numbers(place, name, "loss", "loss_without_memory", kind="eval")
        for given, expected in zip(given_held, held, strict=True):
            assert given == pytest.approx(expected, abs=2e-5)
        weights = exported(place, name)
        for key, value in exported(place, "constant").items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
