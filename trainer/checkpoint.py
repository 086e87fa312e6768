"""Checkpoints of a run: one directory each, complete or absent.

A checkpoint is written under a temporary name and renamed when every rank has finished, and an old
one is renamed before it is removed, so a directory named ``step-00000100`` is whole whenever the
process died. `state.json` ties together what belongs together: DeepSpeed's files, the data cursor,
and the memory's epoch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError

FORMAT = "pluglm-checkpoint-1"
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.json"
_KEY_WEIGHTS = "key_weights.safetensors"
_LOOK_EVERY_S = 0.1
_WRITING, _REPLACED, _REMOVED = ".writing-", ".replaced-", ".removed-"


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps done.
        cursor: place in the data.
        trainers, zero_stage: of the run that wrote it; DeepSpeed's files need the same ones.
        content_version: content of the memory epoch that was live.
        encoder_step: the step whose weights made its keys (they are in the checkpoint).
        published_step: the step from which the next refresh is counted. Weights that were on their
            way into the memory are lost with the run, so it is that of the live keys.
        settings: the run's settings as nested plain values, so that a resumed run can tell what
            changed; empty in a state that was not read from a checkpoint.
    """

    step: int
    cursor: Cursor
    trainers: int
    zero_stage: int
    content_version: str
    encoder_step: int
    published_step: int
    settings: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is committed."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest committed checkpoint, or None; undoes a replacement that a crash cut in two."""
    for replaced in (run_dir / CHECKPOINTS).glob(f"{_REPLACED}step-*"):
        committed = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        # Every rank may look at once; one of them renames.
        with suppress(FileNotFoundError):
            if not committed.exists():
                replaced.rename(committed)
    found = committed_checkpoints(run_dir)
    return found[-1] if found else None


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """All committed checkpoints, oldest first."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def read_state(checkpoint: Path) -> CheckpointState:
    """Read `state.json`.

    Raises:
        CheckpointError: missing, damaged or of another format; the file is named.
    """
    path = checkpoint / _STATE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        sizes = raw.pop("file_bytes")
        state = CheckpointState(**{**raw, "cursor": Cursor.from_json(raw["cursor"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove this checkpoint to resume from the one before"
        ) from error
    for name, size in sizes.items():
        file = checkpoint / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            raise CheckpointError(
                f"{file} is {'missing' if actual is None else f'{actual} bytes'}, but {size} bytes "
                "were written; remove this checkpoint to resume from the one before"
            )
    return state


def read_key_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that made the memory's keys, by name as in `PlugLMModel`, float32."""
    weights: dict[str, Tensor] = load_file(checkpoint / _KEY_WEIGHTS)
    return weights


def begin(run_dir: Path, step: int) -> Path:
    """Make the temporary directory of a checkpoint (rank 0), removing what a crash left behind."""
    temporary = temporary_path(run_dir, step)
    latest_checkpoint(run_dir)
    for pattern in (_WRITING, _REMOVED, _REPLACED):
        for left in temporary.parent.glob(f"{pattern}*"):
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def temporary_path(run_dir: Path, step: int) -> Path:
    """Where ranks write a checkpoint before it is committed."""
    final = checkpoint_path(run_dir, step)
    return final.with_name(f"{_WRITING}{final.name}")


def write_rng(directory: Path, rank: int) -> None:
    """Write this rank's random state: dropout goes on where it stopped."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, directory / _rng_file(rank))


def read_rng(checkpoint: Path, rank: int) -> None:
    """Set this rank's random state from a checkpoint."""
    states = load_file(checkpoint / _rng_file(rank))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def check_written(
    directory: Path, rank: int, patterns: Sequence[str], *, patience_s: float
) -> None:
    """Make sure, before committing, that what a rank wrote can be seen here.

    Args:
        directory: of the checkpoint that is being written.
        rank: whose files.
        patterns: of the engine's files of that rank, relative to the directory.
        patience_s: how long to look; a network's file system may show them a little later.

    Raises:
        CheckpointError: a file is not there.
    """
    deadline = time.monotonic() + patience_s
    for pattern in (_rng_file(rank), *patterns):
        while not any(directory.glob(pattern)):
            if time.monotonic() < deadline:
                time.sleep(_LOOK_EVERY_S)
                continue
            raise CheckpointError(
                f"rank {rank} has written {pattern}, but rank 0 does not see it in {directory}: "
                "run.dir must be one directory on a file system that all nodes share"
            )


def commit(
    run_dir: Path, state: CheckpointState, key_weights: Mapping[str, Tensor], *, keep: int
) -> Path:
    """Complete and publish a checkpoint whose ranks have all written (rank 0 only).

    Everything is synced before the rename, and only then are older checkpoints removed.

    Returns:
        The committed directory.

    Raises:
        OSError: the disk refused; the temporary directory is left for `begin` to remove.
    """
    temporary = temporary_path(run_dir, state.step)
    save_file(dict(key_weights), temporary / _KEY_WEIGHTS)
    inside = sorted(temporary.rglob("*"))
    files = [p for p in inside if p.is_file()]
    values: dict[str, Any] = {
        **asdict(state),
        "cursor": state.cursor.to_json(),
        "format": FORMAT,
        "file_bytes": {str(p.relative_to(temporary)): p.stat().st_size for p in files},
    }
    (temporary / _STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")
    for path in [*inside, temporary / _STATE, temporary]:
        _sync(path)
    final = checkpoint_path(run_dir, state.step)
    if final.exists():
        # The same step again: the newer one replaces it; `latest_checkpoint` knows of a crash here.
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        _remove(replaced)
    else:
        temporary.rename(final)
    _sync(final.parent)
    for old in committed_checkpoints(run_dir)[:-keep]:
        _remove(old)
    return final


def abandon(run_dir: Path, step: int) -> None:
    """Remove the temporary directory of a checkpoint that failed."""
    shutil.rmtree(temporary_path(run_dir, step), ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first, so that half of it is never taken for a whole one."""
    removed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name.removeprefix(_REPLACED)}")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
