"""A run is resumed with the settings that it was started with, or not at all."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cluster.checks import Start, find_start
from cluster.config import config_from_mapping
from cluster.errors import LaunchError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import CheckpointState, Written
from trainer.data.cursor import Cursor
from trainer.settings import ConfigError

TREE = {"data": {"corpus": "/corpora/a"}, "optim": {"steps": 100}}


def write_checkpoint(run_dir: Path) -> None:
    state = CheckpointState(
        step=40,
        cursor=Cursor(0, 7),
        trainers=2,
        zero_stage=2,
        content_version="v",
        encoder_step=20,
        published_step=20,
        settings=tomllib.loads(config_from_mapping(TREE).to_toml()),
    )
    folder = checkpoints.begin(run_dir, 40)
    written = [
        Written(files=checkpoints.write_rng(folder, rank), parameters={}, moments=[])
        for rank in range(2)
    ]
    checkpoints.commit(run_dir, state, {"w": torch.zeros(1)}, written, keep=2)


def resumed(run_dir: Path, overrides: Sequence[str] = ()) -> Start:
    given = config_from_mapping(TREE, overrides)
    return find_start(given, run_dir, resume=True, content="head")


def test_the_same_settings_resume(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    start = resumed(tmp_path)
    assert start.checkpoint is not None
    assert (start.state.step, start.state.content_version) == (40, "v")


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "optim.batch_size=128",
        "optim.lr=0.5",
        "optim.steps=200",
        "data.mask_probability=0.3",
        "model.hidden_size=128",
        "memory.top_k=3",
        "memory.refresh=sync",
        "runtime.trainers=4",
        "runtime.zero_stage=1",
        "runtime.precision=bf16",
    ],
)
def test_a_setting_that_changes_the_result_is_named(tmp_path: Path, override: str) -> None:
    write_checkpoint(tmp_path)
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"^{key} = .*resume with {key}="):
        resumed(tmp_path, [override])


@pytest.mark.parametrize(
    "override",
    [
        "run.name=again",
        "data.corpus=/moved/a",
        "memory.shards=5",
        "memory.deadline_s=5.0",
        "runtime.threads_per_trainer=4",
        "checkpoint.every_steps=7",
        "logging.wandb=offline",
        "evaluate.sequences=3",
        "cluster.address=auto",
    ],
)
def test_what_does_not_change_the_result_may_differ(tmp_path: Path, override: str) -> None:
    write_checkpoint(tmp_path)
    assert resumed(tmp_path, [override]).state.step == 40


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path: Path) -> None:
    given = config_from_mapping(TREE)
    with pytest.raises(LaunchError, match="no committed checkpoint"):
        find_start(given, tmp_path, resume=True, content="head")
    fresh = find_start(given, tmp_path, resume=False, content="head")
    assert (fresh.state.step, fresh.state.content_version) == (0, "head")
    write_checkpoint(tmp_path)
    with pytest.raises(LaunchError, match="already holds a run"):
        find_start(given, tmp_path, resume=False, content="head")
