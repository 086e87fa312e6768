"""The driver's eyes on one gang of trainers: progress, failures, stalls, and the wish to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.config import RecoveryConfig
from cluster.errors import GraceOver
from cluster.recovery import TrainersStalled
from cluster.stop import Stop
from cluster.trainer_actor import Gang, first_failure
from trainer.job import TrainJob, TrainOutcome
from trainer.progress import Progress

_POLL_S = 0.5
# A gang whose collective broke is left so long for the rank that knows the reason to say it.
_GRACE_FOR_REASONS_S = 5.0
_START_S = 900.0

Say = Callable[[str], None]


class Watch:
    """Watches trainers until they are done.

    Attributes:
        step: the last one that is known to be done.
    """

    def __init__(
        self, gang: Gang, job: TrainJob, recovery: RecoveryConfig, stop: Stop, tell: Say
    ) -> None:
        self._gang, self._job, self._recovery = gang, job, recovery
        self._stop, self._tell = stop, tell
        self.step = job.start.step
        self._pulse, self._moved = -1, time.monotonic()
        self._asked: float | None = None

    def until_trained(self) -> TrainOutcome:
        """Show progress until every rank has ended.

        Raises:
            GraceOver: a checkpoint was asked for and took too long.
            TrainersStalled: nothing moved. What the rank that failed first raised.
        """
        settings = self._job.settings
        references = self._gang.start(self._job)
        progress: Progress | None = None
        if settings.logging.progress:
            progress = Progress(settings.optim.steps, start_step=self._job.start.step)
        self._stop.training = True
        try:
            waiting = references
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
                self._look_at_stop()
                self._look_at_progress(progress)
                if ready and _any_failed(ready):
                    failure = first_failure(references, grace_s=_GRACE_FOR_REASONS_S)
                    assert failure is not None
                    raise failure
            outcome: TrainOutcome = ray.get(references[0])
            return outcome
        finally:
            self._stop.training = False
            if progress is not None:
                progress.close()

    def until_evaluated(self) -> dict[str, Any]:
        """Have rank 0 evaluate what was trained. Raises what that raised."""
        reference = self._gang.evaluate(self._job)
        answered = time.monotonic()
        while True:
            ready, waiting = ray.wait([reference], timeout=_POLL_S)
            self._stop.check()
            now = time.monotonic()
            if self._gang.poll() is not None:
                answered = now
            elif waiting and now - answered > self._recovery.stall_timeout_s:
                raise TrainersStalled(now - answered, self._gang.silent())
            if waiting:
                continue
            failure = first_failure(ready)
            if failure is not None:
                raise failure
            evaluation: dict[str, Any] = ray.get(reference)
            return evaluation

    def _look_at_stop(self) -> None:
        if not self._stop.event.is_set():
            return
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._tell("stopping after this step: writing a checkpoint (again to end at once) ...")
            self._gang.request_stop()
        elif now - self._asked > self._recovery.grace_s:
            raise GraceOver(self._recovery.grace_s)

    def _look_at_progress(self, progress: Progress | None) -> None:
        polled, now = self._gang.poll(), time.monotonic()
        if polled is not None:
            for message in polled.messages:
                self._tell(message)
            self.step = max(self.step, int(polled.line.get("step", 0)))
            if progress is not None and "step" in polled.line:
                progress.update(polled.line)
        if polled is not None and polled.pulse != self._pulse:
            self._pulse, self._moved = polled.pulse, now
        elif now - self._moved > self._patience_s:
            raise TrainersStalled(now - self._moved, self._gang.silent())

    @property
    def _patience_s(self) -> float:
        """Until the first step trainers load libraries, weights and data, and show nothing."""
        stall_s = self._recovery.stall_timeout_s
        started = self.step > self._job.start.step
        return stall_s if started else max(stall_s, _START_S)


def _any_failed(ready: list[Any]) -> bool:
    try:
        ray.get(ready)
    # Whatever a rank raised; `first_failure` finds out which rank knows the reason.
    except Exception:
        return True
    return False
