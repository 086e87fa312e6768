"""Saving a run's checkpoint: all ranks write, rank 0 makes sure and commits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint as checkpoints
from trainer.checkpoint import CheckpointState
from trainer.data.cursor import Cursor
from trainer.distributed import first_failure, sum_over_ranks
from trainer.engine import TrainingEngine
from trainer.errors import CheckpointError, CheckpointRefused, TrainingError
from trainer.follower import MemoryFollower
from trainer.reads.counter import ReadCounter
from trainer.reads.files import Counted, write_counted
from trainer.settings import TrainSettings


class CheckpointSaver:
    """One rank's part in saving; `save` is collective."""

    def __init__(
        self,
        run_dir: Path,
        settings: TrainSettings,
        resolved_config: dict[str, Any],
        *,
        rank: int,
        engine: TrainingEngine,
        follower: MemoryFollower,
        record: Callable[..., None],
        saved_step: int,
        corpus_fingerprint: str = "",
        patience_s: float = 60.0,
        beat: Callable[[], None] = lambda: None,
        reads: ReadCounter | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            run_dir: the run's directory, the same one for every rank.
            settings: the run's settings; resolved_config: them as plain values, for the state.
            rank: this trainer.
            engine: what is saved; follower: with which keys.
            record: ``record(kind, step, **numbers)`` writes a metrics line (rank 0).
            saved_step: of the checkpoint that the run was resumed from; -1: none.
            corpus_fingerprint: of the corpus that is trained on.
            patience_s: how long rank 0 looks for what the other ranks wrote.
            beat: called between the parts of the work, to show that it goes on.
            reads: counts what is read of the memory; None: nobody does.
        """
        self._run_dir, self._settings, self._config = run_dir, settings, resolved_config
        self._rank, self._engine, self._follower = rank, engine, follower
        self._record, self._patience_s, self._beat = record, patience_s, beat
        self._corpus_fingerprint, self._reads = corpus_fingerprint, reads
        self.saved_step = saved_step

    def save(self, step: int, cursor: Cursor) -> None:
        """Write and commit the checkpoint of a step; collective.

        Args:
            step: optimizer steps done.
            cursor: place in the data.

        Raises:
            TrainingError: the weights are not finite: such ones are not kept.
            CheckpointRefused: the disk refused. CheckpointError: ranks write to different ones.
                What was committed before is untouched.
        """
        started = time.perf_counter()
        self._check_finite(step)
        temporary = checkpoints.temporary_path(self._run_dir, step)
        self._together(step, lambda: self._lead(lambda: checkpoints.begin(self._run_dir, step)))
        counted = None if self._reads is None else self._reads.counted()
        self._together(step, lambda: self._write(temporary, counted))
        counters = self._engine.counters()
        self._together(step, lambda: self._lead(lambda: self._commit(step, cursor, counters)))
        self.saved_step = step
        # The checkpoint is there, whatever becomes of this line.
        path = checkpoints.checkpoint_path(self._run_dir, step)
        seconds = time.perf_counter() - started
        self._record("checkpoint", step, seconds=seconds, path=str(path))

    def _write(self, temporary: Path, counted: Counted | None) -> None:
        checkpoints.wait_for_directory(temporary, self._rank, patience_s=self._patience_s)
        written = self._engine.save(temporary)
        written.files.update(checkpoints.write_rng(temporary, self._rank))
        if counted is not None:
            written.files.update(write_counted(temporary, counted))
        checkpoints.write_part(temporary, self._rank, written)

    def _commit(self, step: int, cursor: Cursor, counters: dict[str, Any]) -> None:
        runtime = self._settings.runtime
        temporary = checkpoints.temporary_path(self._run_dir, step)
        written = checkpoints.read_parts_written(
            temporary, runtime.trainers, patience_s=self._patience_s
        )
        follower = self._follower
        state = CheckpointState(
            step=step,
            cursor=cursor,
            trainers=runtime.trainers,
            zero_stage=runtime.zero_stage,
            content_version=follower.content_version,
            encoder_step=follower.encoder_step,
            # Weights on their way into the memory are lost with the run: a resumed one counts
            # from the keys that it has, and publishes again as soon as that is due.
            published_step=follower.encoder_step,
            engine=counters,
            corpus_fingerprint=self._corpus_fingerprint,
            settings=self._config,
        )
        keep = self._settings.checkpoint.keep
        checkpoints.commit(self._run_dir, state, follower.live_weights, written, keep=keep)

    def _check_finite(self, step: int) -> None:
        """Refuse weights that nobody can go on from, on every rank together; collective."""
        broken = torch.tensor(float(not self._engine.weights_are_finite()))
        if sum_over_ranks(broken.to(self._engine.device)):
            raise TrainingError(
                f"not finite at step {step}: weights; training has diverged, so this step is not "
                f"saved; {self._kept()}: resume from it with --resume, or start another run with a "
                "lower optim.lr"
            )

    def _lead(self, write: Callable[[], object]) -> None:
        if self._rank == 0:
            write()

    def _together(self, step: int, write: Callable[[], object]) -> None:
        """Write, and fail on every rank with the same reason if that failed on one; collective."""
        self._beat()
        failure: Exception | None = None
        reason: str | None = None
        try:
            write()
        # Some libraries report a full disk as a RuntimeError.
        except (OSError, RuntimeError, CheckpointError) as error:
            failure, reason = error, self._told(step, error)
        told = first_failure(reason, self._engine.device)
        if told is None:
            return
        if self._rank == 0:
            checkpoints.abandon(self._run_dir, step)
        # Ranks that write to different disks would do so again.
        hopeless = torch.tensor(float(isinstance(failure, CheckpointError)))
        kind: type[CheckpointError] = CheckpointRefused
        if sum_over_ranks(hopeless.to(self._engine.device)):
            kind = CheckpointError
        raise kind(told) from failure

    def _told(self, step: int, error: Exception) -> str:
        could_not = f"the checkpoint of step {step} could not be written to {self._run_dir}"
        if isinstance(error, CheckpointError):
            return f"{could_not}: {error}; {self._kept()}"
        try:
            room = f"; {shutil.disk_usage(self._run_dir).free / 2**20:.0f} MiB free"
            kept = self._kept()
        except OSError as gone:
            room, kept = "", f"its directory cannot be looked at ({gone})"
        return f"{could_not} by rank {self._rank} ({error}{room}); {kept}; make room"

    def _kept(self) -> str:
        last = checkpoints.latest_checkpoint(self._run_dir)
        return f"{last.name} is untouched" if last else "no checkpoint had been written before"
