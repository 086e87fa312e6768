"""Every stage, number of trainers, number format and kind of memory saving learns the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multiprocess.engine_case import (
    Numbers,
    computes_in,
    engine_losses,
    global_batches,
    new_model,
    part_of,
    plain_losses,
    train_settings,
)
from tests.multiprocess.ranks import run_ranks
from trainer.engine import TrainingEngine
from trainer.lamb import Lamb
from trainer.optim import lr_factor, parameter_groups
from trainer.settings import TrainSettings

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 20


@dataclass(frozen=True)
class Case:
    ranks: int
    stage: int
    passes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def runs_here(self) -> bool:
        return computes_in(self.options.get("precision", "fp32"))

    @property
    def settings(self) -> TrainSettings:
        norm = "layer" if self.passes > 1 else "batch"
        options = {"query_norm": norm, **self.options}
        return train_settings(self.stage, self.passes, ranks=self.ranks, steps=STEPS, **options)

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([f"{self.ranks}x zero-{self.stage} passes={self.passes}", *words])


ADAMW = [
    *(Case(ranks, stage) for ranks in (1, 2, 4) for stage in range(4)),
    *(Case(2, stage, passes=2) for stage in (1, 3)),
    Case(2, 1, options={"offload_optimizer": "cpu"}),
    Case(2, 2, options={"offload_optimizer": "cpu"}),
    Case(2, 3, options={"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    Case(2, 0, options={"activation_checkpointing": True}),
    Case(2, 2, options={"activation_checkpointing": True}),
    Case(2, 3, options={"activation_checkpointing": True}),
    Case(2, 2, options={"fused": False}),
]
NARROW = [
    *(Case(2, stage, options={"precision": "bf16"}) for stage in (0, 1, 3)),
    *(Case(2, stage, options={"precision": "fp16"}) for stage in (0, 2, 3)),
]
LAMB = {"optimizer": "lamb", "lr": 0.02}
LAMBS = [
    Case(1, 1, options=LAMB),
    *(Case(2, stage, options=LAMB) for stage in range(4)),
    *(Case(4, stage, options=LAMB) for stage in (2, 3)),
    Case(2, 3, options={**LAMB, "offload_optimizer": "cpu"}),
    Case(2, 2, passes=2, options=LAMB),
]
ALL = [*ADAMW, *NARROW, *LAMBS]


def on_a_rank(rank: int, ranks: int) -> dict[str, Numbers]:
    told = {}
    for case in ALL:
        if case.runs_here and case.ranks == ranks:
            settings = case.settings
            # The narrow ones are slow on a CPU.
            steps = 6 if case in NARROW else STEPS
            searches: list[int] = []
            engine = TrainingEngine(new_model(settings), settings, "cpu")
            losses = engine_losses(engine, rank, range(steps), searches=searches)
            told[str(case)] = {
                "losses": losses,
                "searches": len(searches),
                "applied": int(engine.counters()["global_steps"])
                - int(engine.counters()["skipped_steps"]),
                "norm": engine.grad_norm,
            }
    return told


class Told:
    """What the ranks of each case told; those of one number of ranks run once, when asked for."""

    def __init__(self) -> None:
        self._by_ranks: dict[int, list[dict[str, Numbers]]] = {}

    def __getitem__(self, case: Case) -> list[Numbers]:
        if case.ranks not in self._by_ranks:
            self._by_ranks[case.ranks] = run_ranks(on_a_rank, case.ranks, case.ranks, timeout_s=500)
        return [own[str(case)] for own in self._by_ranks[case.ranks]]


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@cache
def plain(norm: str) -> list[float]:
    losses, _, _ = plain_losses(train_settings(0, 1, ranks=1, steps=STEPS, query_norm=norm))
    return losses


@pytest.mark.parametrize("case", ADAMW, ids=str)
def test_twenty_losses_are_those_of_plain_torch(told: Told, case: Case) -> None:
    wanted = plain(case.settings.model.query_norm)
    assert wanted[-1] < wanted[0] - 0.3
    for own in told[case]:
        assert own["losses"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_narrow_numbers_learn_nearly_the_same(told: Told, case: Case) -> None:
    """fp16 leaves out steps that overflow, until its scale fits: stages differ in which."""
    if not case.runs_here:
        pytest.skip(f"this CPU does not compute in {case.options['precision']}")
    for own in told[case]:
        wanted = plain("batch")[:6]
        if own["applied"] == 6:
            assert own["losses"] == pytest.approx(wanted, abs=0.03)
        else:
            assert case.options["precision"] == "fp16"
            assert own["losses"][0] == pytest.approx(wanted[0], abs=0.03)
            assert own["applied"] >= 3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_recomputed_layer_does_not_search_again(told: Told, stage: int) -> None:
    again = Case(2, stage, options={"activation_checkpointing": True})
    assert [own["searches"] for own in told[again]] == [STEPS, STEPS]
    assert [own["searches"] for own in told[Case(2, stage)]] == [STEPS, STEPS]


def lamb_in_float64(settings: TrainSettings) -> list[float]:
    """LAMB as the paper writes it, parameter by parameter, on one process."""
    optim = settings.optim
    model = new_model(settings).double().train()
    groups = parameter_groups(model, optim)
    factor = lr_factor(optim)
    moments: dict[int, tuple[Tensor, Tensor]] = {}
    losses = []
    for step, batch in enumerate(global_batches()[:STEPS]):
        loss = model(**part_of(batch, slice(None))).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        losses.append(float(loss.detach()))
        for group in groups:
            for w in group["params"]:
                m, v = moments.get(id(w), (torch.zeros_like(w), torch.zeros_like(w)))
                m = optim.betas[0] * m + (1 - optim.betas[0]) * w.grad
                v = optim.betas[1] * v + (1 - optim.betas[1]) * w.grad**2
                moments[id(w)] = m, v
                m_hat = m / (1 - optim.betas[0] ** (step + 1))
                v_hat = v / (1 - optim.betas[1] ** (step + 1))
                r = m_hat / (v_hat.sqrt() + optim.eps) + group["weight_decay"] * w.detach()
                ratio = 1.0
                if group["weight_decay"]:
                    sizes = float(w.detach().norm()), float(r.norm())
                    ratio = sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
                with torch.no_grad():
                    w -= group["lr"] * factor(step) * ratio * r
    return losses


@cache
def lamb_wanted(norm: str) -> list[float]:
    options: dict[str, Any] = {**LAMB, "query_norm": norm}
    return lamb_in_float64(train_settings(0, 1, ranks=1, steps=STEPS, **options))


@pytest.mark.parametrize("case", LAMBS, ids=str)
def test_lamb_is_the_papers_under_every_stage(told: Told, case: Case) -> None:
    wanted = lamb_wanted(case.settings.model.query_norm)
    assert wanted[-1] < wanted[0] - 0.3
    for own in told[case]:
        assert own["losses"] == pytest.approx(wanted, abs=1e-4)


def test_lamb_without_the_ranks_sums_would_have_been_noticed() -> None:
    """The tests above are worth something only if trust ratios matter here."""
    settings = train_settings(0, 1, ranks=1, steps=STEPS, **LAMB)
    adam = plain_losses(train_settings(0, 1, ranks=1, steps=STEPS, lr=LAMB["lr"]))[0]
    lamb = lamb_wanted("batch")
    assert max(abs(a - b) for a, b in zip(adam, lamb, strict=True)) > 0.1
    assert plain_losses(settings)[0] == pytest.approx(lamb, abs=1e-4)


def test_lamb_of_a_parameter_of_zeros_moves_it() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Lamb([weight], lr=0.1, weight_decay=0.01)
    weight.grad = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    optimizer.step()
    expected = torch.tensor([[-0.1, 0.1], [0.0, -0.1]])
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-4)
