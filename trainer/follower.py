"""How training follows the memory: when to publish weights, and when to switch epochs.

*Stage asynchronously, switch synchronously.* Rank 0 decides at every step boundary and all ranks
carry it out together, so that one optimizer step, all its micro-batches and all ranks see exactly
one epoch. Search itself has no collectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

from torch import Tensor

from memory_server.api import Memory
from memory_server.kept_pin import KeptPin
from trainer.distributed import broadcast_integers
from trainer.drift import KeyDrift
from trainer.engine import TrainingEngine
from trainer.errors import TrainingError
from trainer.publisher import Publisher
from trainer.settings import MemorySettings

_MOST_FAILURES = 3


class _Publish(IntEnum):
    NO = 0
    AND_GO_ON = 1
    AND_WAIT = 2


class _Published(IntEnum):
    UNDER_WAY = 0
    LIVE = 1
    FAILED = 2
    STOPPED = 3


class RefreshClock:
    """When weights are due to be published, and when training must wait. Pure."""

    def __init__(self, settings: MemorySettings) -> None:
        self._on = settings.refresh != "off"
        self._every = settings.refresh_every_steps
        self._bound = settings.max_staleness_steps

    def due(self, step: int, published_step: int) -> bool:
        """Whether the weights of this step are to be published."""
        return self._on and step - published_step >= self._every

    def too_stale(self, step: int, encoder_step: int) -> bool:
        """Whether the live keys are as old as allowed, so that training must wait."""
        return self._on and self._bound > 0 and step - encoder_step >= self._bound


class MemoryFollower:
    """One rank's view of the memory: the epoch that its searches are pinned to."""

    def __init__(
        self,
        memory: Memory,
        engine: TrainingEngine,
        settings: MemorySettings,
        *,
        rank: int,
        epoch: int,
        encoder_step: int,
        published_step: int,
        live_content: str,
        live_weights: dict[str, Tensor],
        content_version: Callable[[int], str | None],
        stop_requested: Callable[[], bool],
        record: Callable[..., None],
        say: Callable[[str], None],
        drift: KeyDrift | None = None,
    ) -> None:
        """Start at an epoch that is live.

        Args:
            memory: the memory; only rank 0 stages, activates and releases.
            engine: whose weights are published.
            settings: refresh policy.
            rank: this trainer.
            epoch: the live epoch; encoder_step: of its keys.
            published_step: step of the last published weights.
            live_content: content version of the live epoch.
            live_weights: the weights that made its keys; a checkpoint needs them.
            content_version: content that a refresh at a step brings along (None: unchanged).
            stop_requested: whether someone asked the run to end (rank 0; the others' is ignored).
            record: ``record(kind, step, **numbers)`` writes a metrics line (rank 0).
            say: tells the person who watches (rank 0).
            drift: how far refreshes move keys (rank 0); None: not told.
        """
        self._engine, self._settings = engine, settings
        self._leads = rank == 0
        self._clock = RefreshClock(settings)
        self.epoch, self.encoder_step, self.published_step = epoch, encoder_step, published_step
        self._record, self._stop_requested = record, stop_requested
        # Rank 0's alone is used; it pins the epoch for all of them.
        self._publisher = Publisher(
            memory,
            pin=KeptPin(memory, epoch) if self._leads else None,
            live_content=live_content,
            live_weights=live_weights,
            content_version=content_version,
            stop_requested=stop_requested,
            record=record,
            say=say,
            drift=drift if self._leads else None,
        )
        self._published_at = self._stood_still = 0.0

    @property
    def content_version(self) -> str:
        """Content of the live epoch (rank 0)."""
        return self._publisher.content_version

    @property
    def live_weights(self) -> dict[str, Tensor]:
        """The weights that made the live keys (rank 0)."""
        return self._publisher.live_weights

    def boundary(self, step: int) -> bool:
        """Between two steps, on all ranks together; collective.

        Args:
            step: optimizer steps done.

        Returns:
            Whether to end, the same on every rank.

        Raises:
            TrainingError: the keys may not get older, and newer ones cannot be made; or refresh
                after refresh fails; or the shards do not switch to the new keys.
        """
        started = time.perf_counter()
        switch, step_of_keys, publish = self._decide(step) if self._leads else (-1, 0, 0)
        # A stop may have come meanwhile.
        plan = [int(self._stopping()), switch, step_of_keys, int(publish)]
        plan.append(self._publisher.failures_in_a_row)
        stop, switch, encoder_step, publish, failures = broadcast_integers(
            plan, self._engine.device
        )
        if switch >= 0:
            self._switch(step, switch, encoder_step, started)
        if stop:
            return True
        if failures >= _MOST_FAILURES:
            raise TrainingError(
                f"{failures} refreshes in a row failed{self._reason}; the keys are those of step "
                f"{self.encoder_step}, training is at step {step}: what was committed before is "
                "kept, go on from it with --resume, which starts the memory anew"
            )
        if publish != _Publish.NO:
            outcome = self._publish(step, wait=publish == _Publish.AND_WAIT)
            if outcome == _Published.STOPPED:
                return True
        if self._clock.too_stale(step, self.encoder_step):
            raise TrainingError(
                f"the keys are {step - self.encoder_step} steps old, memory.max_staleness_steps = "
                f"{self._settings.max_staleness_steps} allows no more, and the refresh failed"
                f"{self._reason}"
            )
        return False

    def close(self) -> None:
        """Let go of the epoch that is read (rank 0); not collective."""
        self._publisher.close()

    def finish(self, step: int) -> bool:
        """Bring the keys up to the final weights, unless refresh is off; collective, blocks.

        Returns:
            False: done. True: someone asked to stop before the keys were ready.

        Raises:
            TrainingError: it failed. The model must have been exported and committed by now.
        """
        if self._settings.refresh == "off":
            return False
        self._publisher.give_up()
        outcome = self._publish(step, wait=True)
        if outcome == _Published.FAILED:
            raise TrainingError(
                f"the refresh after the last step failed{self._reason}; the model is exported and "
                f"the checkpoint of step {step} is committed, but the memory's keys are still "
                f"those of step {self.encoder_step}: complete the run with --resume"
            )
        return outcome == _Published.STOPPED

    @property
    def _reason(self) -> str:
        return f": {self._publisher.failure}" if self._leads else " (rank 0 says why)"

    def _stopping(self) -> bool:
        return self._leads and self._stop_requested()

    def _decide(self, step: int) -> tuple[int, int, int]:
        """Rank 0: (epoch to switch to or -1, the step of its keys, whether to publish)."""
        stale = self._clock.too_stale(step, self.encoder_step) and not self._stopping()
        publisher, switch, step_of_keys, renewed = self._publisher, -1, 0, False
        if publisher.staging:
            state, reason = publisher.wait() if stale else publisher.look()
            if state == "sealed":
                # What is staged was made by the weights published last.
                switch, step_of_keys, renewed = publisher.activate(), self.published_step, True
            elif state == "failed":
                publisher.fail(step, reason, serving=self.epoch)
            elif stale:
                # The wait was ended by a wish to stop.
                publisher.give_up()
        if switch < 0:
            edited = publisher.edited_by_others(self.epoch, self.encoder_step)
            if edited is not None:
                switch, step_of_keys = edited, self.encoder_step
        return switch, step_of_keys, self._publish_now(step, stale=stale and not renewed)

    def _publish_now(self, step: int, *, stale: bool) -> _Publish:
        """Rank 0: whether to publish at this boundary."""
        if self._stopping():
            return _Publish.NO
        if stale:
            return _Publish.AND_WAIT
        if self._publisher.staging or not self._clock.due(step, self.published_step):
            return _Publish.NO
        return _Publish.AND_WAIT if self._settings.refresh == "sync" else _Publish.AND_GO_ON

    def _publish(self, step: int, *, wait: bool) -> _Published:
        """Hand the weights to the memory; with `wait` the new epoch is live when this returns."""
        started = time.perf_counter()
        weights: dict[str, Tensor] = {}
        if self._leads or self._engine.settings.runtime.zero_stage == 3:
            weights = self._engine.key_weights()
        self.published_step = step
        self._published_at = started
        sealed, outcome = -1, _Published.FAILED
        if self._leads:
            self._publisher.stage(step, weights)
            if wait:
                sealed, outcome = self._wait_for_keys(step)
        if not wait:
            self._stood_still = time.perf_counter() - started
            return _Published.UNDER_WAY
        sealed, ended = broadcast_integers([sealed, int(outcome)], self._engine.device)
        self._stood_still = 0.0
        if sealed >= 0:
            self._switch(step, sealed, step, started)
        return _Published(ended)

    def _wait_for_keys(self, step: int) -> tuple[int, _Published]:
        """Rank 0: (the epoch that is live when the keys are ready or -1, how the wait ended)."""
        publisher = self._publisher
        state, reason = publisher.wait()
        if state == "sealed":
            return publisher.activate(), _Published.LIVE
        if state == "failed":
            publisher.fail(step, reason, serving=self.epoch)
            return -1, _Published.FAILED
        publisher.give_up()
        return -1, _Published.STOPPED

    def _switch(self, step: int, epoch: int, encoder_step: int, started: float) -> None:
        """Every rank: searches are pinned to the new epoch from now on."""
        previous, self.epoch, self.encoder_step = self.epoch, epoch, encoder_step
        if not self._leads:
            return
        edited = self._publisher.edited
        memory_bytes = self._publisher.let_go(step, previous)
        if edited:
            return
        now = time.perf_counter()
        self._record(
            "refresh",
            step,
            epoch=epoch,
            encoder_step=encoder_step,
            published_step=encoder_step,
            seconds_total=now - self._published_at,
            seconds_stood_still=self._stood_still + (now - started),
            seconds_publishing=self._stood_still,
            mode=self._settings.refresh,
            **self._publisher.moved(),
            **memory_bytes,
        )
