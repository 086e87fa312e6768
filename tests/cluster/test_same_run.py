"""A run is resumed with the settings that it was started with, or not at all."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cluster.config import config_from_mapping
from cluster.errors import LaunchError
from cluster.starting import Start, find_start
from trainer import checkpoint as checkpoints
from trainer.checkpoint import CheckpointState, Written
from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError
from trainer.settings import ConfigError

TREE = {"data": {"corpus": "/corpora/a"}, "optim": {"steps": 100}}


def write_checkpoint(
    run_dir: Path, step: int = 40, *, keep: int = 2, given: Sequence[str] = ()
) -> Path:
    state = CheckpointState(
        step=step,
        cursor=Cursor(0, 7),
        trainers=2,
        zero_stage=2,
        content_version="v",
        encoder_step=20,
        published_step=20,
        corpus_fingerprint="corpus-a",
        settings=tomllib.loads(config_from_mapping(TREE, given).to_toml()),
    )
    folder = checkpoints.begin(run_dir, step)
    written = [
        Written(files=checkpoints.write_rng(folder, rank), parameters={}, moments=[])
        for rank in range(2)
    ]
    return checkpoints.commit(run_dir, state, {"w": torch.zeros(1)}, written, keep=keep)


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
        "runtime.trainers=4",
        "runtime.zero_stage=1",
        "runtime.micro_batch_size=8",
        "checkpoint.every_steps=7",
        "logging.wandb=offline",
        "evaluate.sequences=3",
        "cluster.address=auto",
    ],
)
def test_what_does_not_change_the_result_may_differ(tmp_path: Path, override: str) -> None:
    write_checkpoint(tmp_path)
    assert resumed(tmp_path, [override]).state.step == 40


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        write_checkpoint(tmp_path, step, keep=3)
    assert resumed(tmp_path).notes == ()
    flip_a_byte(tmp_path / "checkpoints" / "step-00000060" / "rng-00001.safetensors")
    (tmp_path / "checkpoints" / "step-00000040" / "key_weights.safetensors").unlink()
    start = resumed(tmp_path)
    assert start.state.step == 20
    first, second, last = start.notes
    assert first.startswith("step-00000060 is damaged and passed over: ")
    assert "rng-00001.safetensors is damaged: its checksum" in first
    assert "key_weights.safetensors is missing" in second
    assert last == "going on from the one before, step-00000020: 40 steps are done again"


def test_with_all_checkpoints_damaged_there_is_one_clear_error(tmp_path: Path) -> None:
    for step in (20, 40):
        flip_a_byte(write_checkpoint(tmp_path, step) / "key_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used \(step-00000040: "):
        resumed(tmp_path)


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    given = config_from_mapping(TREE)
    for fingerprint in ("corpus-a", ""):
        find_start(given, tmp_path, resume=True, content="head", fingerprint=fingerprint)
    with pytest.raises(ConfigError, match=r"data\.corpus = /corpora/a: is another corpus"):
        find_start(given, tmp_path, resume=True, content="head", fingerprint="corpus-b")


def test_other_trainers_are_welcome_and_what_that_changes_is_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    told = resumed(tmp_path, ["runtime.trainers=4", "runtime.zero_stage=3"]).notes
    (note,) = told
    assert note.startswith("saved by 2 trainers (ZeRO-2), going on with 4 (ZeRO-3)")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["optim.retrieval_warmup_steps=60"], "negatives are now 8 sequences and were 32"),
        (["model.query_norm=batch"], "statistics are now those of 16 sequences and were of 64"),
    ],
)
def test_a_pass_of_another_size_is_said_where_it_changes_what_is_learned(
    tmp_path: Path, given: list[str], said: str
) -> None:
    write_checkpoint(tmp_path, given=given)
    (note,) = resumed(tmp_path, [*given, "runtime.micro_batch_size=8"]).notes
    assert said in note


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path: Path) -> None:
    given = config_from_mapping(TREE)
    with pytest.raises(LaunchError, match="no committed checkpoint"):
        find_start(given, tmp_path, resume=True, content="head")
    fresh = find_start(given, tmp_path, resume=False, content="head")
    assert (fresh.state.step, fresh.state.content_version) == (0, "head")
    write_checkpoint(tmp_path)
    with pytest.raises(LaunchError, match="already holds a run"):
        find_start(given, tmp_path, resume=False, content="head")
