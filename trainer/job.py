"""What the driver hands to every trainer, and what a trainer hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_server.api import Memory
from trainer.checkpoint import CheckpointState
from trainer.settings import TrainSettings
from trainer.task import Task


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A fault that ended the trainers before these.

    Attributes:
        reason: in one line. restarts: of this command, this one included.
        failed_step: the last step that is known to have been done before it.
        began: when it was noticed, of `time.time`.
    """

    reason: str
    restarts: int
    failed_step: int
    began: float


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that a rank is given; the same for all of them. Picklable.

    Attributes:
        settings: the run's settings.
        run_dir: where it writes; every rank reaches it.
        task: what is trained on.
        memory: the memory; epoch: of it, with the keys of `start`; content_version: of that epoch.
        tokenizer: directory of the tokenizer, saved beside the model.
        model_config: as a dictionary.
        device: "cpu" or "cuda".
        init_method: where the ranks meet.
        checkpoint: to resume from; None: start afresh.
        start: step, cursor and refresh state at the start.
        resolved_config: the settings as nested plain values, shown by wandb and kept in every
            checkpoint.
        driver_mark: a file that the driver has written into `run_dir`; empty: rank 0 is the driver.
        notes: what happened at the start, such as a damaged checkpoint; recorded as events.
        recovery: which fault these trainers go on after; None: the run was started by a person.
    """

    settings: TrainSettings
    run_dir: Path
    task: Task
    memory: Memory
    epoch: int
    content_version: str
    tokenizer: Path
    model_config: dict[str, Any]
    device: str
    init_method: str
    checkpoint: Path | None
    start: CheckpointState
    resolved_config: dict[str, Any]
    driver_mark: str = ""
    notes: tuple[str, ...] = ()
    recovery: Recovery | None = None

    @property
    def resumes(self) -> bool:
        """Whether metrics of this run are there already."""
        return self.checkpoint is not None or self.recovery is not None


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a run ended."""

    step: int
    stopped: bool
    checkpoint: Path
