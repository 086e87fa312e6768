"""A checkpoint is whole or absent, whenever the process that wrote it died."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from trainer import checkpoint, parameter_files, tensor_files
from trainer.checkpoint import CheckpointState, Written
from trainer.checkpoint_state import OldCheckpointFormat, damages
from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError
from trainer.tensor_files import file_record

SHARD = "shard-0.bin"
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
    """What the trainers do, with a file in place of the engine's."""
    temporary = checkpoint.begin(run_dir, step)
    (temporary / SHARD).write_text(content or f"weights of {step}")
    files = {SHARD: file_record(temporary / SHARD), **checkpoint.write_rng(temporary, 0)}
    checkpoint.write_part(temporary, 0, Written(files=files, parameters={}, moments=[]))
    written = checkpoint.read_parts_written(temporary, 1, patience_s=0)
    return checkpoint.commit(run_dir, state(step), KEY_WEIGHTS, written, keep=keep)


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


def test_an_old_one_that_cannot_be_removed_does_not_undo_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a directory of which a file is open or mapped stays."""
    write(tmp_path, 5, keep=1)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.shutil.rmtree", busy)
        path = write(tmp_path, 10, keep=1)
    assert checkpoint.latest_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["step-00000010"]
    write(tmp_path, 15, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000015"]


def test_the_same_step_again_replaces_the_older_one(tmp_path: Path) -> None:
    write(tmp_path, 5, content="first")
    path = write(tmp_path, 5, content="second")
    assert (path / SHARD).read_text() == "second"
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.read_state(path) == state(5)


@pytest.mark.parametrize("missing", ["shard-0.bin", "key_weights.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path, 5)
    (path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing} is missing, but .* remove this"):
        checkpoint.read_state(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5, content="0123456789")
    (path / SHARD).write_text("0123")
    with pytest.raises(
        CheckpointError, match=r"shard-0\.bin is 4 bytes, but 10 bytes were written"
    ):
        checkpoint.read_state(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": ', "Expecting value"),
        ("", "Expecting value"),
        ('{"format": "pluglm-checkpoint-0"}', "its format is not pluglm-checkpoint-2"),
        ('{"format": "pluglm-checkpoint-2"}', "xxh3_128"),
        ("[]", "list indices"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = write(tmp_path, 5)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"state\.json cannot be read .*{reason}"):
        checkpoint.read_state(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
    """Change `state.json`; with `seal` as somebody who knows of its checksum."""
    values = json.loads((path / "state.json").read_text())
    change(values)
    if seal:
        del values["xxh3_128"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        values["xxh3_128"] = xxh3_128(canonical).hexdigest()
    (path / "state.json").write_text(json.dumps(values))


def test_an_unknown_field_of_the_state_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    rewrite(path, lambda values: values.update(moon="full"), seal=True)
    with pytest.raises(CheckpointError, match="moon"):
        checkpoint.read_state(path)


def test_a_number_of_the_state_that_has_changed_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    rewrite(path, lambda values: values.update(step=6), seal=False)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        checkpoint.read_state(path)


def test_a_file_outside_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    rewrite(path, lambda v: v["files"].update({"../x": v["files"][SHARD]}), seal=True)
    with pytest.raises(CheckpointError, match="outside of its checkpoint"):
        checkpoint.read_state(path)


def test_a_changed_byte_is_found_where_contents_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, 5, content="0123456789")
    assert checkpoint.read_verified(path) == state(5)
    assert damages(path) == []
    (path / SHARD).write_text("0123456780")
    checkpoint.read_state(path)
    with pytest.raises(CheckpointError, match=r"shard-0\.bin is damaged: .* remove this"):
        checkpoint.read_verified(path)
    (path / "key_weights.safetensors").unlink()
    (first, second) = damages(path)
    assert "key_weights.safetensors is missing" in first
    assert "shard-0.bin is damaged" in second


def test_a_checkpoint_of_an_earlier_version_is_refused_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    rewrite(path, lambda values: values.update(format="pluglm-checkpoint-1"), seal=True)
    with pytest.raises(OldCheckpointFormat, match="the version that began it, or start another"):
        checkpoint.read_state(path)


def test_a_later_one_that_was_not_resumed_from_makes_no_newer_one_old(tmp_path: Path) -> None:
    """The one of step 12 is damaged, so the run went on from step 10 and comes to step 11."""
    write(tmp_path, 10, keep=1)
    write(tmp_path, 12, keep=2)
    write(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["step-00000011", "step-00000012"]
    write(tmp_path, 13, keep=1)
    assert names(tmp_path) == ["step-00000013"]


def test_a_rank_whose_files_do_not_make_a_whole_parameter_is_refused(tmp_path: Path) -> None:
    temporary = checkpoint.begin(tmp_path, 5)
    part = {"w": {"shape": [2, 3], "start": 0, "numel": 4}}
    written = [Written(files={}, parameters=part, moments=[])]
    with pytest.raises(CheckpointError, match="4 of the 6 elements of w"):
        checkpoint.commit(tmp_path, state(5), KEY_WEIGHTS, written, keep=2)
    assert temporary.is_dir()
    assert names(tmp_path) == []


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    checkpoint.write_rng(tmp_path, 1)
    following = torch.rand(8)
    torch.manual_seed(99)
    checkpoint.read_rng(tmp_path, 1)
    assert torch.equal(torch.rand(8), following)


TRACED = {module.__file__ for module in (checkpoint, parameter_files, tensor_files)} | {__file__}


def _write_and_die(run_dir: Path, step: int, lines_to_live: int) -> None:
    """Die inside `write`, when the trainer's code and shutil's have run so many lines."""
    lived = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lived
        if frame.f_code.co_filename not in TRACED:
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
    for lines in range(0, 900, 5):
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
        content = (latest / SHARD).read_text()
        assert content in {"first", "second"}
        if process.exitcode == 0:
            assert content == "second"
            assert latest.name == f"step-{step:08d}"
            break
        deaths += 1
        # What the death left behind does not hinder the next attempt, and is cleared away.
        final = write(run_dir, step, keep=1, content="third")
        assert checkpoint.latest_checkpoint(run_dir) == final
        assert (final / SHARD).read_text() == "third"
        assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [final.name]
    else:
        pytest.fail("the checkpoint was never completed")
    assert deaths > 10
