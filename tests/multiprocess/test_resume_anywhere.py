"""What some ranks save under one ZeRO stage, others resume under another."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess.engine_case import (
    Numbers,
    computes_in,
    engine_losses,
    new_model,
    plain_losses,
    save_engine,
    train_settings,
    weights_of,
)
from tests.multiprocess.ranks import run_ranks
from trainer.engine import TrainingEngine
from trainer.errors import CheckpointError
from trainer.settings import TrainSettings

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS, SAVED_AT = 8, 4


@dataclass(frozen=True)
class Case:
    """Trainers and stage that write; trainers, stage and passes per step that go on."""

    ranks: int
    stage: int
    then_ranks: int
    then_stage: int
    then_passes: int = 1
    precision: str = "fp32"
    norm: str = "batch"
    optimizer: str = "adamw"
    offload: str = "none"  # before; what goes on has everything beside the weights

    @property
    def runs_here(self) -> bool:
        return computes_in(self.precision)

    @property
    def folder(self) -> str:
        kind = f"{self.precision}-{self.norm}-{self.optimizer}-{self.offload}"
        return f"{kind}-{self.ranks}x{self.stage}"

    def settings(self, *, then: bool) -> TrainSettings:
        return train_settings(
            self.then_stage if then else self.stage,
            self.then_passes if then else 1,
            ranks=self.then_ranks if then else self.ranks,
            steps=STEPS,
            precision=self.precision,
            query_norm=self.norm,
            optimizer=self.optimizer,
            offload_optimizer="none" if then else self.offload,
        )

    def __str__(self) -> str:
        then = f"{self.then_ranks}x{self.then_stage}"
        return f"{self.folder}-to-{then}" + ("-2-passes" if self.then_passes > 1 else "")


CASES = [
    Case(1, 0, 2, 3),
    Case(1, 2, 2, 1),
    Case(1, 3, 4, 2),
    Case(2, 0, 2, 3),
    Case(2, 2, 4, 3),
    # Passes change what a batch is for BatchNorm.
    Case(2, 2, 1, 2, then_passes=2, norm="layer"),
    Case(2, 3, 2, 1),
    Case(2, 3, 1, 0),
    Case(4, 3, 2, 2),
    Case(4, 0, 1, 3),
    Case(2, 2, 1, 0, precision="bf16"),
    Case(2, 3, 4, 1, precision="bf16"),
    Case(2, 2, 2, 1, precision="fp16"),
    Case(2, 2, 1, 3, optimizer="lamb"),
    Case(2, 3, 2, 0, optimizer="lamb"),
    Case(2, 2, 1, 2, offload="cpu"),
    Case(2, 3, 2, 1, offload="cpu"),
]


def write(rank: int, home: Path, ranks: int) -> dict[str, Numbers]:
    """Train to the middle under every stage that a case begins with, and save."""
    told: dict[str, Numbers] = {}
    for case in CASES:
        if case.runs_here and case.ranks == ranks and case.folder not in told:
            settings = case.settings(then=False)
            engine = TrainingEngine(new_model(settings), settings, "cpu")
            losses = engine_losses(engine, rank, range(SAVED_AT))
            counters = save_engine(engine, home / case.folder, rank)
            losses += engine_losses(engine, rank, range(SAVED_AT, STEPS))
            told[case.folder] = {
                "losses": losses,
                "counters": counters,
                "weights": weights_of(engine),
                "buffers": {n: b.clone() for n, b in engine.model.named_buffers()},
            }
    return told


def go_on(rank: int, home: Path, ranks: int, counters: dict[str, Any]) -> dict[str, Numbers]:
    told: dict[str, Numbers] = {}
    for case in CASES:
        if case.runs_here and case.then_ranks == ranks:
            settings = case.settings(then=True)
            engine = TrainingEngine(new_model(settings, seed=99), settings, "cpu")
            engine.load(home / case.folder, counters[case.folder])
            told[str(case)] = {
                "losses": engine_losses(engine, rank, range(SAVED_AT, STEPS)),
                "counters": engine.counters(),
                "lr": engine.lr,
                "weights": weights_of(engine),
                "buffers": {n: b.clone() for n, b in engine.model.named_buffers()},
            }
    return told


def refuse(rank: int, home: Path, counters: dict[str, Any]) -> list[str]:
    """Loads that must not succeed: another model, and a file that is gone."""
    told = []
    settings = train_settings(2, 1, ranks=1, steps=STEPS)
    wide = replace(settings, model=replace(settings.model, intermediate_size=256))
    gone = home / "gone"
    shutil.copytree(home / CASES[0].folder, gone)
    (gone / "state-00000.safetensors").unlink()
    for folder, given in ((home / CASES[0].folder, wide), (gone, settings)):
        engine = TrainingEngine(new_model(given), given, "cpu")
        try:
            engine.load(folder, counters)
        except CheckpointError as error:
            told.append(str(error))
    return told


@dataclass(frozen=True)
class Outcome:
    """What the ranks that write, and those that go on, told; by case, then by rank."""

    before: dict[str, list[Numbers]]
    after: dict[str, list[Numbers]]
    refused: list[str]
    files: dict[str, list[str]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    home = tmp_path_factory.mktemp("anywhere")
    before: dict[str, list[Numbers]] = {}
    after: dict[str, list[Numbers]] = {}
    for ranks in (1, 2, 4):
        told = run_ranks(write, ranks, home, ranks, timeout_s=300)
        before |= {name: [own[name] for own in told] for name in told[0]}
    counters = {name: own[0]["counters"] for name, own in before.items()}
    for ranks in (1, 2, 4):
        told = run_ranks(go_on, ranks, home, ranks, counters, timeout_s=300)
        after |= {name: [own[name] for own in told] for name in told[0]}
    (refused,) = run_ranks(refuse, 1, home, counters[CASES[0].folder])
    files = {name: sorted(p.name for p in (home / name).iterdir()) for name in before}
    return Outcome(before, after, refused, files)


every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=str(case),
            marks=pytest.mark.skipif(
                not case.runs_here, reason=f"this CPU does not compute in {case.precision}"
            ),
        )
        for case in CASES
    ],
)


@every_case
def test_losses_are_those_of_the_uninterrupted_run(outcome: Outcome, case: Case) -> None:
    """Narrow weights round differently in other layouts of the sums."""
    tolerance = 2e-5 if case.precision == "fp32" else 0.02
    wanted = outcome.before[case.folder][0]["losses"][SAVED_AT:]
    for own in outcome.after[str(case)]:
        assert own["losses"] == pytest.approx(wanted, abs=tolerance)


@every_case
def test_weights_and_statistics_end_as_in_the_uninterrupted_run(
    outcome: Outcome, case: Case
) -> None:
    tolerance = 2e-4 if case.precision == "fp32" else 0.02
    wanted = outcome.before[case.folder][0]
    for own in outcome.after[str(case)]:
        for what in ("weights", "buffers"):
            assert own[what].keys() == wanted[what].keys()
            for name, value in wanted[what].items():
                torch.testing.assert_close(own[what][name], value, rtol=tolerance, atol=tolerance)


@every_case
def test_steps_are_counted_on_and_statistics_are_equal_on_all_ranks(
    outcome: Outcome, case: Case
) -> None:
    first, *others = outcome.after[str(case)]
    assert first["counters"]["global_steps"] == STEPS
    assert first["lr"] == 0.0, "the schedule has come to its end"
    for own in others:
        assert own["counters"] == first["counters"]
        for name, value in first["buffers"].items():
            assert torch.equal(own["buffers"][name], value), name


@pytest.mark.skipif(not computes_in("fp16"), reason="this CPU does not compute in fp16")
def test_the_loss_scale_is_carried_on(outcome: Outcome) -> None:
    case = next(case for case in CASES if case.precision == "fp16")
    before = outcome.before[case.folder][0]["counters"]["loss_scale"]
    after = outcome.after[str(case)][0]["counters"]["loss_scale"]
    assert before["cur_iter"] == SAVED_AT
    assert after["cur_iter"] == STEPS
    assert after["cur_scale"] == before["cur_scale"] > 1


def test_the_uninterrupted_run_is_that_of_plain_torch(outcome: Outcome) -> None:
    """Or all of them could be wrong together."""
    plain, _, _ = plain_losses(train_settings(0, 1, steps=STEPS))
    for case in CASES:
        if (case.precision, case.norm, case.optimizer) == ("fp32", "batch", "adamw"):
            given = outcome.before[case.folder][0]["losses"]
            assert given == pytest.approx(plain, abs=2e-5), str(case)


def test_every_rank_writes_a_file_of_its_own(outcome: Outcome) -> None:
    for case in (case for case in CASES if case.runs_here):
        states = [name for name in outcome.files[case.folder] if name.startswith("state-")]
        assert len(states) == case.ranks
        assert not [name for name in outcome.files[case.folder] if name.endswith(".pt")]


def test_a_checkpoint_of_another_model_or_without_a_file_is_refused(outcome: Outcome) -> None:
    other, gone = outcome.refused
    assert "is of another model: its parameter" in other
    assert "[192" in other
    assert "[256" in other
    assert "state-00000.safetensors cannot be read" in gone
