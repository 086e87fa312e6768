"""Timers and means that do not wait for the device."""

import math

import pytest
import torch

from trainer.meters import RunningMeans, StepTimer


def test_a_timer_sums_parts_and_starts_afresh_when_taken() -> None:
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    for seconds in (1.0, 2.0):
        with timer.part("retrieval"):
            now[0] += seconds

    def fail() -> None:
        with timer.part("data"):
            now[0] += 0.5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    timer.add("data", 0.25)
    assert timer.take() == ({"retrieval": 3.0, "data": 0.75}, 3.5)
    assert timer.take() == ({}, 0.0)


def test_means_are_weighted_and_reset() -> None:
    means = RunningMeans()
    means.add(weight=3, loss=torch.tensor(1.0, requires_grad=True), rate=0.0)
    means.add(weight=torch.tensor(1), loss=5.0, rate=1.0)
    assert means.take() == {"loss": 2.0, "rate": 0.25}
    assert means.take() == {}


def test_a_step_of_weight_zero_counts_for_nothing_even_when_nan() -> None:
    means = RunningMeans()
    means.add(weight=0, loss=float("nan"))
    assert math.isnan(means.take()["loss"])
    means.add(weight=0, loss=float("nan"))
    means.add(weight=2, loss=1.5)
    assert means.take() == {"loss": 1.5}


def test_other_ranks_are_summed_in_one_call() -> None:
    calls: list[torch.Tensor] = []

    def all_reduce(totals: torch.Tensor) -> None:
        calls.append(totals)
        totals += torch.tensor([[3.0, 30.0], [1.0, 3.0]])  # another rank's sums and counts

    means = RunningMeans()
    means.add(b=10.0, a=1.0)
    assert means.take(all_reduce) == {"a": 2.0, "b": 10.0}
    assert len(calls) == 1


def test_what_happens_while_paused_is_left_out() -> None:
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    with timer.part("retrieval"):
        now[0] += 1.0
    with timer.paused(), timer.part("retrieval"):
        now[0] += 100.0
    now[0] += 2.0
    assert timer.take() == ({"retrieval": 1.0}, 3.0)
