"""Checkpoints of a run: one directory each, complete or absent.

A checkpoint is written under a temporary name and renamed when every rank has finished, and an old
one is renamed before it is removed, so a directory named ``step-00000100`` is whole whenever the
process died. What is in it, and whether it is undamaged, is told by `trainer.checkpoint_state`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint_state import (
    STATE,
    CheckpointState,
    read_state,
    read_verified,
    state_text,
)
from trainer.errors import CheckpointError
from trainer.parameter_files import PARAMETERS, Written, write_index
from trainer.tensor_files import FileRecord, TensorSource, write_json, write_tensors

__all__ = [
    "CHECKPOINTS",
    "CheckpointState",
    "Written",
    "abandon",
    "begin",
    "checkpoint_path",
    "checkpoint_step",
    "commit",
    "committed_checkpoints",
    "latest_checkpoint",
    "read_key_weights",
    "read_parts_written",
    "read_rng",
    "read_state",
    "read_verified",
    "temporary_path",
    "wait_for_directory",
    "write_part",
    "write_rng",
]

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_KEY_WEIGHTS = "key_weights.safetensors"
_LOOK_EVERY_S = 0.1
log = logging.getLogger(__name__)

_SHARE = "run.dir must be one directory on a file system that all nodes share"
_WRITING, _REPLACED, _REMOVED = ".writing-", ".replaced-", ".removed-"


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


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a committed checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def read_key_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that made the memory's keys, by name as in `PlugLMModel`, float32."""
    # Copied: a file that is mapped cannot be removed on every network filesystem.
    return {name: w.clone() for name, w in load_file(checkpoint / _KEY_WEIGHTS).items()}


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


def wait_for_directory(temporary: Path, rank: int, *, patience_s: float) -> None:
    """Wait until a rank sees the directory that rank 0 has made for a checkpoint.

    Raises:
        CheckpointError: it does not.
    """
    deadline = time.monotonic() + patience_s
    while not temporary.is_dir():
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"rank 0 has made {temporary}, but rank {rank} does not see it: {_SHARE}"
            )
        time.sleep(_LOOK_EVERY_S)


def write_rng(directory: Path, rank: int) -> dict[str, FileRecord]:
    """Write this rank's random state: dropout goes on where it stopped. Returns what was written.

    Raises:
        OSError: the disk refused.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    sources = [TensorSource.of(name, state) for name, state in states.items()]
    return {_rng_file(rank): write_tensors(directory / _rng_file(rank), sources)}


def read_rng(checkpoint: Path, rank: int) -> None:
    """Set this rank's random state from a checkpoint of as many ranks.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint / _rng_file(rank)
    try:
        states = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def write_part(directory: Path, rank: int, written: Written) -> None:
    """Tell rank 0, who commits, that a rank has written all of its files, and which."""
    draft = directory / f"{_part_file(rank)}.tmp"
    write_json(draft, written.to_json())
    draft.rename(directory / _part_file(rank))


def read_parts_written(directory: Path, ranks: int, *, patience_s: float) -> list[Written]:
    """What all ranks have written, before committing.

    Args:
        directory: of the checkpoint that is being written.
        ranks: how many.
        patience_s: how long to look; a network's file system may show files a little later.

    Raises:
        CheckpointError: a rank's files are not there.
    """
    deadline = time.monotonic() + patience_s
    written = []
    for rank in range(ranks):
        _wait_for(directory, _part_file(rank), rank, deadline)
        text = (directory / _part_file(rank)).read_text(encoding="utf-8")
        own = Written.from_json(json.loads(text))
        for name in own.files:
            _wait_for(directory, name, rank, deadline)
        written.append(own)
    return written


def commit(
    run_dir: Path,
    state: CheckpointState,
    key_weights: Mapping[str, Tensor],
    written: Sequence[Written],
    *,
    keep: int,
) -> Path:
    """Complete and publish a checkpoint whose ranks have all written (rank 0 only).

    Everything is synced before the rename, and only then are older checkpoints removed.

    Args:
        run_dir: the run's directory.
        state: what the checkpoint is of.
        key_weights: those that made the live keys.
        written: what each rank wrote, in their order.
        keep: how many checkpoints are kept, this one and older ones.

    Returns:
        The committed directory.

    Raises:
        OSError: the disk refused; the temporary directory is left for `begin` to remove.
        CheckpointError: the ranks' files do not make a whole.
    """
    temporary = temporary_path(run_dir, state.step)
    files = {name: record for own in written for name, record in own.files.items()}
    files[PARAMETERS] = write_index(temporary, written)
    sources = [TensorSource.of(name, weight) for name, weight in key_weights.items()]
    files[_KEY_WEIGHTS] = write_tensors(temporary / _KEY_WEIGHTS, sources)
    for rank in range(len(written)):
        (temporary / _part_file(rank)).unlink(missing_ok=True)
    (temporary / STATE).write_text(state_text(state, files), encoding="utf-8")
    for path in [*sorted(temporary.iterdir()), temporary]:
        _sync(path)
    final = checkpoint_path(run_dir, state.step)
    if final.exists():
        # The same step again: the newer one replaces it; `latest_checkpoint` knows of a crash here.
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        _remove_if_possible(replaced)
    else:
        temporary.rename(final)
    _sync(final.parent)
    # A later step can only be one that the run did not resume from, because it is damaged: it must
    # not make this one count as old.
    until_now = [p for p in committed_checkpoints(run_dir) if checkpoint_step(p) <= state.step]
    for old in until_now[:-keep]:
        _remove_if_possible(old)
    return final


def abandon(run_dir: Path, step: int) -> None:
    """Remove the temporary directory of a checkpoint that failed."""
    shutil.rmtree(temporary_path(run_dir, step), ignore_errors=True)


def _remove_if_possible(checkpoint: Path) -> None:
    """The new checkpoint is committed by now, whatever becomes of this one; `begin` tries again."""
    try:
        _remove(checkpoint)
    except OSError as error:
        log.warning("the checkpoint %s, which is not needed, stays: %s", checkpoint, error)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renamed first, so that half of it is never taken for a whole one."""
    removed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name.removeprefix(_REPLACED)}")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def _wait_for(directory: Path, name: str, rank: int, deadline: float) -> None:
    """Wait until a file of a rank can be seen here."""
    while not (directory / name).exists():
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"rank {rank} has written {name}, but rank 0 does not see it in {directory}: "
                f"{_SHARE}"
            )
        time.sleep(_LOOK_EVERY_S)


def _part_file(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
