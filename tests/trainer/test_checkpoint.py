"""A checkpoint is whole or absent, whenever the process that wrote it died."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import CheckpointState
from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError

KEY_WEIGHTS = {"embeddings.word_embeddings.weight": torch.arange(6.0).reshape(2, 3)}


def state(step: int, **changes: Any) -> CheckpointState:
    values: dict[str, Any] = {
        "step": step,
        "cursor": Cursor(1, 17),
        "trainers": 2,
        "zero_stage": 3,
        "content_version": "v-7",
        "encoder_step": step - 1,
        "published_step": step,
        "settings": {"optim": {"lr": 1e-3, "betas": [0.9, 0.98]}, "run": {"name": "a"}},
    }
    return CheckpointState(**(values | changes))


def write(run_dir: Path, step: int, *, keep: int = 2, content: str = "") -> Path:
    """What the trainers do, with a file in place of DeepSpeed's."""
    temporary = checkpoint.begin(run_dir, step)
    (temporary / "engine").mkdir()
    (temporary / "engine" / "shard-0.pt").write_text(content or f"weights of {step}")
    checkpoint.write_rng(temporary, 0)
    return checkpoint.commit(run_dir, state(step), KEY_WEIGHTS, keep=keep)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.committed_checkpoints(run_dir)]


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    assert checkpoint.latest_checkpoint(tmp_path) == path
    assert checkpoint.read_state(path) == state(100)
    weights = checkpoint.read_key_weights(path)
    assert set(weights) == set(KEY_WEIGHTS)
    assert all(torch.equal(weights[name], KEY_WEIGHTS[name]) for name in weights)


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.committed_checkpoints(tmp_path) == []


def test_what_is_being_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    checkpoint.write_rng(checkpoint.begin(tmp_path, 10), 0)
    assert names(tmp_path) == ["step-00000005"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 1000):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00001000"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)


def test_the_same_step_again_replaces_the_older_one(tmp_path: Path) -> None:
    write(tmp_path, 5, content="first")
    path = write(tmp_path, 5, content="second")
    assert (path / "engine" / "shard-0.pt").read_text() == "second"
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.read_state(path) == state(5)


@pytest.mark.parametrize("missing", ["engine/shard-0.pt", "key_weights.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path, 5)
    (path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing} is missing, but .* remove this"):
        checkpoint.read_state(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5, content="0123456789")
    (path / "engine" / "shard-0.pt").write_text("0123")
    with pytest.raises(CheckpointError, match=r"shard-0\.pt is 4 bytes, but 10 bytes were written"):
        checkpoint.read_state(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": ', "Expecting value"),
        ("", "Expecting value"),
        ('{"format": "pluglm-checkpoint-0"}', "its format is not pluglm-checkpoint-1"),
        ('{"format": "pluglm-checkpoint-1"}', "file_bytes"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = write(tmp_path, 5)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"state\.json cannot be read .*{reason}"):
        checkpoint.read_state(path)


def test_an_unknown_field_of_the_state_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | {"moon": "full"}))
    with pytest.raises(CheckpointError, match="moon"):
        checkpoint.read_state(path)


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    checkpoint.write_rng(tmp_path, 1)
    following = torch.rand(8)
    torch.manual_seed(99)
    checkpoint.read_rng(tmp_path, 1)
    assert torch.equal(torch.rand(8), following)


def _write_and_die(run_dir: Path, step: int, lines_to_live: int) -> None:
    """Die inside `write`, when the trainer's code and shutil's have run so many lines."""
    lived = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lived
        if frame.f_code.co_filename not in {checkpoint.__file__, __file__}:
            return trace if frame.f_code.co_filename.endswith("shutil.py") else None
        if event == "line":
            lived += 1
            if lived > lines_to_live:
                os._exit(1)
        return trace

    sys.settrace(trace)
    write(run_dir, step, keep=1, content="second")
    sys.settrace(None)
    os._exit(0)


@pytest.mark.parametrize("step", [5, 10])
def test_death_at_any_line_leaves_the_last_checkpoint(tmp_path: Path, step: int) -> None:
    """keep=1, so that nothing but the last one could be resumed from; step 5 is replaced."""
    context = multiprocessing.get_context("fork")
    deaths = 0
    for lines in range(0, 400, 3):
        run_dir = tmp_path / str(lines)
        write(run_dir, 5, content="first")
        process = context.Process(target=_write_and_die, args=(run_dir, step, lines))
        process.start()
        process.join()
        latest = checkpoint.latest_checkpoint(run_dir)
        assert latest is not None, f"nothing left after {lines} lines"
        for path in checkpoint.committed_checkpoints(run_dir):
            found = checkpoint.read_state(path)
            assert path.name == f"step-{found.step:08d}"
        content = (latest / "engine" / "shard-0.pt").read_text()
        assert content in {"first", "second"}
        if process.exitcode == 0:
            assert content == "second"
            assert latest.name == f"step-{step:08d}"
            break
        deaths += 1
        # What the death left behind does not hinder the next attempt, and is cleared away.
        final = write(run_dir, step, keep=1, content="third")
        assert checkpoint.latest_checkpoint(run_dir) == final
        assert (final / "engine" / "shard-0.pt").read_text() == "third"
        assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [final.name]
    else:
        pytest.fail("the checkpoint was never completed")
    assert deaths > 10
