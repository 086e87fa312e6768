"""Layouts that a user's own JSON makes are trained, saved and resumed like the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.engine_case import (
    Numbers,
    engine_losses,
    new_model,
    save_engine,
    train_settings,
)
from tests.multiprocess.ranks import run_ranks
from trainer.engine import TrainingEngine

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS, SAVED_AT, RANKS = 6, 3, 2
# (stage, precision, optimizer, the user's JSON)
CASES: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "float32 gradients": (1, "bf16", "adamw", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "float32 gradients, lamb": (1, "bf16", "lamb", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "many groups": (3, "fp32", "adamw", {"zero_optimization": {"sub_group_size": 9000}}),
    "many groups, lamb": (3, "fp32", "lamb", {"zero_optimization": {"sub_group_size": 9000}}),
    "aligned": (2, "fp32", "lamb", {"zero_optimization": {"parameter_alignment": True}}),
    "small buckets": (2, "fp32", "adamw", {"zero_optimization": {"reduce_bucket_size": 5000}}),
}


def on_a_rank(rank: int, home: Path) -> dict[str, Numbers]:
    told: dict[str, Numbers] = {}
    for number, (name, (stage, precision, optimizer, own)) in enumerate(CASES.items()):
        path = home / f"{number}-{rank}.json"
        path.write_text(json.dumps(own))
        options: dict[str, Any] = {"precision": precision, "optimizer": optimizer}
        given = train_settings(stage, 1, steps=STEPS, deepspeed_config=str(path), **options)
        engine = TrainingEngine(new_model(given), given, "cpu")
        losses = engine_losses(engine, rank, range(SAVED_AT))
        counters = save_engine(engine, home / name, rank)
        losses += engine_losses(engine, rank, range(SAVED_AT, STEPS))
        # What goes on has another layout, or the same one.
        told[name] = {"losses": losses}
        without = train_settings(0, 1, steps=STEPS, **options)
        for key, settings in (("same", given), ("other", without)):
            again = TrainingEngine(new_model(settings, seed=9), settings, "cpu")
            again.load(home / name, counters)
            told[name][key] = engine_losses(again, rank, range(SAVED_AT, STEPS))
        plain = TrainingEngine(new_model(without), without, "cpu")
        told[name]["wanted"] = engine_losses(plain, rank, range(STEPS))
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Numbers]:
    home = tmp_path_factory.mktemp("json")
    result: dict[str, Numbers] = run_ranks(on_a_rank, RANKS, home, timeout_s=280)[0]
    return result


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_resumes_as_without(told: dict[str, Numbers], name: str) -> None:
    own = told[name]
    tolerance = 2e-5 if CASES[name][1] == "fp32" else 0.01
    assert own["losses"] == pytest.approx(own["wanted"], abs=tolerance)
    assert own["same"] == own["losses"][SAVED_AT:], "bit for bit in the same layout"
    assert own["other"] == pytest.approx(own["losses"][SAVED_AT:], abs=tolerance)
