"""Which steps count as left out, and when there are too many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
import torch.distributed as dist

from trainer.engine import TrainingEngine
from trainer.errors import TrainingError
from trainer.skipping import SkippedSteps

SOUND, BROKEN = torch.tensor([2.0, 3.0]), torch.tensor([2.0, float("nan")])


@dataclass
class FakeEngine:
    """An engine whose next step goes as the test says."""

    step_applied: bool = True
    scales_loss: bool = False
    weights_finite: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def weights_are_finite(self) -> bool:
        return self.weights_finite


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def counting(engine: FakeEngine, limit: int) -> tuple[SkippedSteps, list[str]]:
    told: list[str] = []
    given = cast(TrainingEngine, engine)
    return SkippedSteps(given, limit=limit, rank=0, ranks=1, tell=told.append), told


def test_sound_steps_are_not_counted_and_end_a_row() -> None:
    engine = FakeEngine()
    skipped, told = counting(engine, 2)
    for step, applied in enumerate([True, False, False, True, False], start=1):
        engine.step_applied = applied
        assert skipped.after(step, SOUND) is not applied
    assert (skipped.in_a_row, skipped.in_all) == (1, 3)
    assert not skipped.too_many
    assert skipped.take() == 3
    assert skipped.take() == 0
    assert "its gradient is not finite (1 in a row, 3 in all" in told[-1]


def test_a_row_longer_than_the_limit_is_too_many() -> None:
    skipped, told = counting(FakeEngine(step_applied=False), 2)
    for step in (1, 2):
        skipped.after(step, BROKEN)
        assert not skipped.too_many
    skipped.after(3, BROKEN)
    assert skipped.too_many
    assert "its loss (rank 0) is not finite" in told[0]
    assert "saved as step-3" in str(skipped.error(3, "step-3"))


def test_the_first_is_too_many_where_none_is_allowed() -> None:
    skipped, _ = counting(FakeEngine(step_applied=False), 0)
    skipped.after(1, BROKEN)
    assert skipped.too_many


def test_ten_times_the_limit_is_too_many_however_far_apart() -> None:
    engine = FakeEngine()
    skipped, _ = counting(engine, 1)
    for step in range(1, 22):
        engine.step_applied = step % 2 == 0
        skipped.after(step, BROKEN)
        assert skipped.too_many == (step == 21)


def test_what_fp16_could_not_hold_is_no_fault_but_a_broken_loss_is() -> None:
    skipped, told = counting(FakeEngine(step_applied=False, scales_loss=True), 1)
    assert not skipped.after(1, SOUND)
    assert (skipped.in_all, told) == (0, [])
    assert skipped.after(2, BROKEN)
    assert skipped.in_all == 1


def test_weights_that_are_not_finite_end_the_run_at_once() -> None:
    skipped, _ = counting(FakeEngine(step_applied=False, weights_finite=False), 10)
    with pytest.raises(TrainingError, match="not finite at step 7: weights; training has diverged"):
        skipped.after(7, BROKEN)
