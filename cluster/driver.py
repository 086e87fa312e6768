"""One run under its driver: trainers are watched, and started again when a fault ends them.

The memory outlives the trainers: after a fault it is given the keys of the checkpoint that they go
on from, and answers all the while.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster import checks
from cluster.config import PretrainConfig
from cluster.errors import GraceOver, LaunchError, NoRoom, TrainersNotUp
from cluster.recovery import (
    Fault,
    Restarts,
    first_line,
    may_be_repeated,
    smaller_gangs,
)
from cluster.run_memory import RunMemory
from cluster.starting import Start, find_start
from cluster.stop import Stop
from cluster.trainer_actor import Gang, trainer_gang
from cluster.watch import Say, Watch
from memory_server.errors import MemoryServerError
from model import PlugLMConfig
from trainer.checkpoint import checkpoint_step, latest_checkpoint, read_key_weights
from trainer.errors import TrainingError
from trainer.export import MODEL
from trainer.job import Recovery, TrainJob, TrainOutcome
from trainer.settings import ConfigError
from trainer.shared_directory import driver_mark
from trainer.task import Task

_SMALLER_GANG_TIMEOUT_S = 15.0
_RENEW_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What stays the same however often trainers are started.

    Attributes:
        config, source, task, shape: of the run.
        first: where this command began; weights: that made the keys there.
        run_dir: absolute.
    """

    config: PretrainConfig
    source: checks.Source
    task: Task
    shape: PlugLMConfig
    first: Start
    weights: dict[str, Tensor]
    run_dir: Path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the last trainers ended.

    Attributes:
        outcome: of training. evaluation: None if a signal ended it before.
        lines: what `after` had to say.
    """

    outcome: TrainOutcome
    evaluation: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()


class Driver:
    """Keeps trainers going until the run is complete, or cannot be completed."""

    def __init__(
        self, plan: RunPlan, serving: RunMemory, device: str, *, stop: Stop, tell: Say
    ) -> None:
        """Ray and the memory are up; no trainer is.

        Args:
            device: "cpu" or "cuda", for trainers.
        """
        self._plan, self._serving, self._device = plan, serving, device
        self._stop, self._tell = stop, tell
        self._restarts = Restarts(plan.config.recovery.max_restarts, saved_step=self._saved_step())

    def run(self, after: Callable[[TrainJob], list[str]] | None) -> Ended:
        """Train and evaluate; blocks.

        Args:
            after: called with the job when the evaluation is done and the memory still serves.

        Raises:
            GraceOver: a signal came, and no checkpoint was written in time.
            TrainingError, LaunchError: it cannot go on; what was committed is kept.
        """
        start, recovery = self._plan.first, None
        while True:
            outcome: TrainOutcome | None = None
            with ExitStack() as stack:
                try:
                    gang, config = self._gang(stack, again=recovery is not None)
                except TrainersNotUp as error:
                    # At first it is for a person to look at; later the cluster may be in motion.
                    if recovery is None:
                        raise
                    start, recovery = self._after(Fault.now(error, recovery.failed_step))
                    continue
                mark = stack.enter_context(driver_mark(self._plan.run_dir))
                job = replace(self._job(config, gang, start, recovery), driver_mark=mark)
                watch = Watch(gang, job, config.recovery, self._stop, self._tell)
                try:
                    outcome = watch.until_trained()
                    if outcome.stopped:
                        return Ended(outcome=outcome)
                    self._tell("evaluating on held-out text ...")
                    evaluation = watch.until_evaluated()
                    lines = () if after is None else tuple(after(job))
                    return Ended(outcome=outcome, evaluation=evaluation, lines=lines)
                except GraceOver:
                    raise
                except Exception as error:
                    if not may_be_repeated(error):
                        raise explained(
                            error, self._plan.run_dir, trained=outcome is not None
                        ) from error.__cause__
                    fault = Fault.now(error, watch.step)
            start, recovery = self._after(fault)

    def _after(self, fault: Fault) -> tuple[Start, Recovery]:
        """Where to go on after a fault; the memory has the keys for it.

        Raises:
            TrainingError: it happened too often.
        """
        # Whoever takes the machine away may have ended trainers first.
        self._stop.check()
        saved = self._saved_step()
        if not self._restarts.allow(saved_step=saved):
            raise self._given_up(fault)
        start = self._restart_point()
        recovery = fault.recovery(restarts=self._restarts.count, step=start.state.step)
        again = recovery.failed_step - start.state.step
        where = "the beginning" if start.checkpoint is None else start.checkpoint.name
        self._tell(f"{recovery.reason}; starting again from {where}: {again} steps are done again")
        for note in start.notes:
            self._tell(note)
        self._stop.check()
        weights = self._plan.weights
        if start.checkpoint is not None:
            weights = read_key_weights(start.checkpoint)
        self._renew(start, weights)
        return start, recovery

    def _renew(self, start: Start, weights: dict[str, Tensor]) -> None:
        """Give the memory its keys; shards of a node that was lost may come back only later.

        Raises:
            TrainingError: they cannot be made.
        """
        deadline = time.monotonic() + self._plan.config.recovery.wait_for_nodes_s
        while True:
            self._stop.check()
            try:
                self._serving.renew(start, weights)
            except MemoryServerError as error:
                if time.monotonic() < deadline:
                    self._tell(f"the memory has no keys yet: {first_line(error)}; trying again ...")
                    time.sleep(_RENEW_EVERY_S)
                    continue
                raise TrainingError(
                    f"the memory could not be given the keys of step {start.state.encoder_step}: "
                    f"{first_line(error)}; {_kept(self._plan.run_dir)}"
                ) from error
            self._stop.check()
            return

    def _restart_point(self) -> Start:
        plan = self._plan
        if self._saved_step() < 0:
            return replace(plan.first, notes=())
        return find_start(
            plan.config,
            plan.run_dir,
            resume=True,
            content=plan.first.state.content_version,
            fingerprint=plan.source.fingerprint,
        )

    def _gang(self, stack: ExitStack, *, again: bool) -> tuple[Gang, PretrainConfig]:
        """Trainers that are up, and the configuration with their number."""
        config, recovery = self._plan.config, self._plan.config.recovery
        first_timeout_s = recovery.wait_for_nodes_s if again else recovery.placement_timeout_s
        smaller = smaller_gangs(config, recovery.min_trainers) if recovery.min_trainers else []
        sizes = [config.runtime.trainers, *smaller]
        for trainers in sizes:
            runtime = replace(config.runtime, trainers=trainers)
            whole = trainers == config.runtime.trainers
            try:
                gang = stack.enter_context(
                    trainer_gang(
                        runtime,
                        on_gpu=self._device == "cuda",
                        loopback=config.cluster.address == "local",
                        timeout_s=first_timeout_s if whole else _SMALLER_GANG_TIMEOUT_S,
                    )
                )
            except NoRoom:
                self._stop.check()
                if trainers == sizes[-1]:
                    raise
                continue
            self._stop.check()
            if not whole:
                self._tell(
                    f"going on with {trainers} trainers: there is no room for "
                    f"{config.runtime.trainers}"
                )
            return gang, replace(config, runtime=runtime)
        raise AssertionError("the last size returns or raises")

    def _job(
        self, config: PretrainConfig, gang: Gang, start: Start, recovery: Recovery | None
    ) -> TrainJob:
        plan, serving = self._plan, self._serving
        return TrainJob(
            settings=config,
            run_dir=plan.run_dir,
            task=plan.task,
            memory=serving.memory,
            epoch=serving.epoch,
            content_version=serving.content_version,
            tokenizer=plan.source.tokenizer.resolve(),
            model_config=plan.shape.to_dict(),
            device=self._device,
            init_method=gang.rendezvous,
            checkpoint=start.checkpoint,
            start=start.state,
            notes=start.notes,
            resolved_config=tomllib.loads(config.to_toml()),
            recovery=recovery,
        )

    def _saved_step(self) -> int:
        last = latest_checkpoint(self._plan.run_dir)
        return -1 if last is None else checkpoint_step(last)

    def _given_up(self, fault: Fault) -> TrainingError:
        tried = self._restarts.count - 1
        times = f" after {tried} restarts in vain" if tried else ""
        kept = _kept(self._plan.run_dir)
        error = TrainingError(f"training failed{times}: {first_line(fault.failure)}; {kept}")
        error.__cause__ = fault.failure
        return error


def explained(failure: Exception, run_dir: Path, *, trained: bool) -> Exception:
    """A failure with what was kept and what to do; one that says it itself as it is.

    Args:
        trained: it befell the evaluation.
    """
    if isinstance(failure, TrainingError | LaunchError | ConfigError):
        return failure
    reason = f"{type(failure).__name__}: {first_line(failure)}"
    if trained:
        return TrainingError(
            f"the evaluation failed: {reason}; training is complete and its model is "
            f"{run_dir / MODEL}: evaluate it again with --resume"
        )
    return TrainingError(f"training failed: {reason}; {_kept(run_dir)}")


def _kept(run_dir: Path) -> str:
    last = latest_checkpoint(run_dir)
    return f"go on from {last.name} with --resume" if last else "no checkpoint was due yet"
