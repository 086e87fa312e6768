"""The engine under every ZeRO stage equals plain torch on one process with the whole batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import PlugLMForMaskedLM
from tests.multiprocess.engine_case import (
    RANKS,
    Numbers,
    engine_losses,
    new_model,
    plain_losses,
    save_engine,
    train_settings,
    weights_of,
)
from tests.multiprocess.ranks import run_ranks
from trainer.distributed import barrier
from trainer.engine import TrainingEngine
from trainer.held_layouts import held_part
from trainer.optim import lr_factor

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 6
STAGES = (0, 1, 2, 3)


def on_a_rank(rank: int, folder: str) -> Numbers:
    results: Numbers = {}
    for query_norm in ("layer", "batch"):
        settings = train_settings(0, 1, query_norm=query_norm)
        losses, norms, model = plain_losses(settings)
        named = {name: p.detach() for name, p in model.named_parameters()}
        results[f"plain {query_norm}"] = {
            "losses": losses,
            "grad_norm": norms,
            "weights": named,
            "keys": model.key_weights(),
            "buffers": {name: b.clone() for name, b in model.named_buffers()},
        }
    for stage in STAGES:
        for passes in (1, 2):
            results[f"zero-{stage} x{passes}"] = one_case(rank, stage, passes, Path(folder))
    settings = train_settings(0, 1, precision="bf16")
    engine = TrainingEngine(new_model(settings), settings, "cpu")
    norms: Numbers = {}
    results["bf16"] = {
        "losses": engine_losses(engine, rank, range(STEPS), norms),
        "grad_norm": norms["grad_norm"],
        "buffers": {name: b.clone() for name, b in engine.model.named_buffers()},
        "keys": engine.key_weights(),
        "dtype": str(engine.model.head.dense.weight.dtype),
    }
    return results


def spoil_padding(engine: TrainingEngine) -> int:
    """What DeepSpeed leaves unwritten at the end of ZeRO-3's slices may hold anything."""
    spoiled = 0
    for parameter in engine.model.parameters():
        if hasattr(parameter, "ds_tensor"):
            padding = parameter.ds_tensor.data[held_part(parameter).numel() :]
            spoiled += padding.fill_(float("nan")).numel()
    return spoiled


def one_case(rank: int, stage: int, passes: int, folder: Path) -> Numbers:
    """All steps, and once more from a checkpoint in the middle.

    BatchNorm's statistics are those of a pass, so only one pass equals the whole batch with it.
    """
    query_norm = "batch" if passes == 1 else "layer"
    settings = train_settings(stage, passes, query_norm=query_norm)
    engine = TrainingEngine(new_model(settings), settings, "cpu")
    results: Numbers = {"padding": spoil_padding(engine)}
    losses = engine_losses(engine, rank, range(STEPS // 2), results)
    saved = folder / f"{stage}-{passes}"
    counters = save_engine(engine, saved, rank)
    results["finite"] = (engine.weights_are_finite(), engine.step_applied)
    losses += engine_losses(engine, rank, range(STEPS // 2, STEPS), results)
    results |= {
        "losses": losses,
        "keys": engine.key_weights(),
        "weights": weights_of(engine),
        "buffers": {name: b.clone() for name, b in engine.model.named_buffers()},
        "held": sum(p.numel() for p in engine.model.parameters()),
    }
    with engine.whole_weights() as whole:
        if rank == 0:
            whole.save_pretrained(saved / "export")
    barrier()
    del engine
    resumed = TrainingEngine(new_model(settings), settings, "cpu")
    resumed.load(saved, counters)
    results["resumed"] = engine_losses(resumed, rank, range(STEPS // 2, STEPS))
    results["resumed weights"] = weights_of(resumed)
    results["resumed buffers"] = {n: b.clone() for n, b in resumed.model.named_buffers()}
    # Behind the memory: before it, the query would be refused.
    for parameter in resumed.model.head.dense.parameters():
        getattr(parameter, "ds_tensor", parameter).data.fill_(float("nan"))
    engine_losses(resumed, rank, range(1))
    results["finite when diverged"] = (resumed.weights_are_finite(), resumed.step_applied)
    return results


@pytest.fixture(scope="module")
def gang() -> tuple[list[Numbers], dict[str, dict[str, Tensor]]]:
    """Both ranks' results, and the exported models; one gang for all tests, which only look."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(on_a_rank, RANKS, folder, timeout_s=300.0)
        exported = {
            name: PlugLMForMaskedLM.from_pretrained(Path(folder) / name / "export").state_dict()
            for name in sorted(path.name for path in Path(folder).iterdir())
        }
        return ranks, exported


Gang = tuple[list[Numbers], dict[str, dict[str, Tensor]]]
every_case = pytest.mark.parametrize("passes", [1, 2], ids="x{}".format)
every_stage = pytest.mark.parametrize("stage", STAGES, ids="zero-{}".format)


def plain_of(gang: Gang, passes: int) -> Numbers:
    plain: Numbers = gang[0][0]["plain batch" if passes == 1 else "plain layer"]
    return plain


def assert_near(given: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            given[name], value, rtol=tolerance, atol=tolerance, msg=_naming(name)
        )


def _naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@every_stage
@every_case
def test_losses_are_those_of_plain_torch(gang: Gang, stage: int, passes: int) -> None:
    plain = plain_of(gang, passes)
    for rank in range(RANKS):
        given = gang[0][rank][f"zero-{stage} x{passes}"]
        assert given["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert plain["losses"][-1] < plain["losses"][0] - 0.05


@every_stage
@every_case
def test_whole_weights_are_those_of_plain_torch(gang: Gang, stage: int, passes: int) -> None:
    for rank in range(RANKS):
        given = gang[0][rank][f"zero-{stage} x{passes}"]["weights"]
        assert_near(given, plain_of(gang, passes)["weights"], 1e-4)


@every_stage
@every_case
def test_published_key_weights_are_whole_and_float32(gang: Gang, stage: int, passes: int) -> None:
    for rank in range(RANKS):
        given = gang[0][rank][f"zero-{stage} x{passes}"]["keys"]
        assert_near(given, plain_of(gang, passes)["keys"], 1e-4)
        assert {tensor.dtype for tensor in given.values()} == {torch.float32}


@every_stage
@every_case
def test_a_resumed_engine_goes_on_bit_for_bit(gang: Gang, stage: int, passes: int) -> None:
    for rank in range(RANKS):
        given = gang[0][rank][f"zero-{stage} x{passes}"]
        assert given["resumed"] == given["losses"][STEPS // 2 :]
        for part in ("weights", "buffers"):
            for name, value in given[part].items():
                assert torch.equal(given[f"resumed {part}"][name], value), name


@every_stage
@every_case
def test_a_diverged_step_is_told_from_a_sound_one(gang: Gang, stage: int, passes: int) -> None:
    for rank in range(RANKS):
        given = gang[0][rank][f"zero-{stage} x{passes}"]
        assert given["finite"] == (True, True)
        assert (given["padding"] > 0) == (stage == 3 and rank == RANKS - 1)
        assert given["finite when diverged"] == (False, False)


@every_stage
@every_case
def test_the_export_holds_the_whole_weights(gang: Gang, stage: int, passes: int) -> None:
    ranks, exported = gang
    wanted = ranks[0][f"zero-{stage} x{passes}"]["weights"]
    given = exported[f"{stage}-{passes}"]
    for name, value in wanted.items():
        assert torch.equal(given[name], value), name


def test_stage_3_does_partition(gang: Gang) -> None:
    """Or the tests above would have shown nothing about it."""
    held = [gang[0][0][f"zero-{stage} x1"]["held"] for stage in STAGES]
    assert held[0] == held[1] == held[2]
    assert held[3] < held[0] / 2


@every_stage
def test_running_statistics_are_float32_equal_on_ranks_and_those_of_one_process(
    gang: Gang, stage: int
) -> None:
    first, second = (gang[0][rank][f"zero-{stage} x1"]["buffers"] for rank in range(RANKS))
    running = {name for name in first if "running" in name}
    assert len(running) == 2
    for name in running:
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name], second[name])
    assert_near(first, plain_of(gang, 1)["buffers"], 1e-4)


def test_the_rate_follows_the_schedule_once_per_optimizer_step(gang: Gang) -> None:
    optim = train_settings(0, 1).optim
    wanted = [optim.lr * lr_factor(optim)(step + 1) for step in range(STEPS)]
    for passes in (1, 2):
        assert gang[0][0][f"zero-2 x{passes}"]["lr"] == pytest.approx(wanted)


def test_the_gradients_norm_is_that_of_the_global_batch(gang: Gang) -> None:
    for passes in (1, 2):
        wanted = plain_of(gang, passes)["grad_norm"]
        for stage in STAGES:
            given = gang[0][0][f"zero-{stage} x{passes}"]["grad_norm"]
            assert given == pytest.approx(wanted, rel=1e-3)
    assert gang[0][0]["bf16"]["grad_norm"][0] == pytest.approx(wanted[0], rel=0.1)
    assert max(wanted) > train_settings(0, 1).optim.grad_clip, "clipping was put to the test"


def test_bf16_trains_near_to_float32_with_statistics_in_float32(gang: Gang) -> None:
    given = gang[0][0]["bf16"]
    assert given["dtype"] == "torch.bfloat16"
    assert given["losses"] == pytest.approx(plain_of(gang, 1)["losses"], rel=0.03)
    running = {name: b for name, b in given["buffers"].items() if "running" in name}
    assert {b.dtype for b in running.values()} == {torch.float32}
    assert {w.dtype for w in given["keys"].values()} == {torch.float32}
    for name, value in gang[0][1]["bf16"]["buffers"].items():
        assert torch.equal(given["buffers"][name], value), name
