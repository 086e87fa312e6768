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

from memory_server.api import Memory, StageState
from memory_server.errors import MemoryServerError
from trainer.distributed import broadcast_integers
from trainer.engine import TrainingEngine
from trainer.errors import TrainingError
from trainer.settings import MemorySettings

_LOOK_EVERY_S = 0.2
_SEAL_TIMEOUT_S = 24 * 3600.0


class _Publish(IntEnum):
    NO = 0
    AND_GO_ON = 1
    AND_WAIT = 2


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
        record: Callable[..., None],
        say: Callable[[str], None],
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
            record: ``record(kind, step, **numbers)`` writes a metrics line (rank 0).
            say: tells the person who watches (rank 0).
        """
        self._memory, self._engine, self._settings = memory, engine, settings
        self._leads = rank == 0
        self._clock = RefreshClock(settings)
        self.epoch, self.encoder_step, self.published_step = epoch, encoder_step, published_step
        self.content_version, self.live_weights = live_content, live_weights
        self._next_content, self._next_weights = live_content, live_weights
        self._content_version, self._record, self._say = content_version, record, say
        self._staged: int | None = None
        self._staged_at = self._looked_at = 0.0
        self._failure = ""
        self._stood_still = 0.0

    def boundary(self, step: int, *, stop: bool) -> bool:
        """Between two steps, on all ranks together; collective.

        Args:
            step: optimizer steps done.
            stop: rank 0's wish to end; the others' is ignored.

        Returns:
            Whether to end, the same on every rank.

        Raises:
            TrainingError: the keys may not get older, and newer ones cannot be made.
        """
        started = time.perf_counter()
        switch, publish = self._decide(step, stop) if self._leads else (-1, _Publish.NO)
        # What is staged was made by the weights published last.
        plan = [int(stop), switch, self.published_step, int(publish)]
        stop_all, switch, encoder_step, publish = broadcast_integers(plan, self._engine.device)
        if switch >= 0:
            self._switch(step, switch, encoder_step, started)
        if publish != _Publish.NO:
            self._publish(step, wait=publish == _Publish.AND_WAIT)
        if not stop_all and self._clock.too_stale(step, self.encoder_step):
            raise TrainingError(
                f"the keys are {step - self.encoder_step} steps old, memory.max_staleness_steps = "
                f"{self._settings.max_staleness_steps} allows no more, and the refresh failed"
                f"{f': {self._failure}' if self._leads else ' (rank 0 says why)'}"
            )
        return bool(stop_all)

    def finish(self, step: int) -> None:
        """Bring the keys up to the final weights, unless refresh is off; collective, blocks."""
        if self._settings.refresh == "off":
            return
        self._drop_staged()
        self._publish(step, wait=True)

    def _decide(self, step: int, stop: bool) -> tuple[int, int]:
        """Rank 0: (sealed epoch to switch to or -1, whether to publish)."""
        stale = not stop and self._clock.too_stale(step, self.encoder_step)
        switch = -1
        if self._staged is not None:
            state, reason = self._look(self._staged, wait=stale)
            if state == "sealed":
                switch = self._staged
            elif state == "failed":
                self._fail(step, reason)
        if stop:
            return switch, _Publish.NO
        if stale and switch < 0:
            return switch, _Publish.AND_WAIT
        if (self._staged is not None and switch < 0) or not self._clock.due(
            step, self.published_step
        ):
            return switch, _Publish.NO
        at_once = self._settings.refresh == "sync"
        return switch, _Publish.AND_WAIT if at_once else _Publish.AND_GO_ON

    def _look(self, epoch: int, *, wait: bool) -> tuple[StageState, str]:
        """How far a staged epoch is, or how it ended up: (state, why it failed)."""
        now = time.monotonic()
        if not wait and now - self._looked_at < _LOOK_EVERY_S:
            return "encoding", ""
        self._looked_at = now
        try:
            if wait:
                self._memory.wait_sealed(epoch, _SEAL_TIMEOUT_S)
                return "sealed", ""
            status = self._memory.staging(epoch)
        except MemoryServerError as error:
            return "failed", str(error)
        return status.state, status.error or ""

    def _publish(self, step: int, *, wait: bool) -> None:
        """Hand the weights to the memory; with `wait` the new epoch is live when this returns."""
        started = time.perf_counter()
        weights: dict[str, Tensor] = {}
        if self._leads or self._engine.settings.runtime.zero_stage == 3:
            weights = self._engine.key_weights()
        self.published_step = step
        sealed = -1
        if self._leads and self._stage(step, weights, started) and wait:
            assert self._staged is not None
            state, reason = self._look(self._staged, wait=True)
            if state == "sealed":
                sealed = self._staged
            else:
                self._fail(step, reason)
        if not wait:
            self._stood_still = time.perf_counter() - started
            return
        (sealed,) = broadcast_integers([sealed], self._engine.device)
        self._stood_still = 0.0
        if sealed >= 0:
            self._switch(step, sealed, step, started)

    def _stage(self, step: int, weights: dict[str, Tensor], started: float) -> bool:
        """Rank 0: begin an epoch of these weights; False when the memory refused it."""
        content = self._content_version(step)
        try:
            self._staged = self._memory.stage(
                encoder_step=step, weights=weights, content_version=content
            )
        except MemoryServerError as error:
            self._fail(step, str(error))
            return False
        self._next_weights = weights
        self._next_content = content or self.content_version
        self._staged_at, self._looked_at = started, 0.0
        return True

    def _switch(self, step: int, epoch: int, encoder_step: int, started: float) -> None:
        """Every rank: searches are pinned to the new epoch from now on."""
        previous, self.epoch, self.encoder_step = self.epoch, epoch, encoder_step
        if not self._leads:
            return
        # No rank searches the old epoch any more: all of them have finished the previous step.
        self._memory.activate(epoch)
        self._memory.release(previous)
        self._staged = None
        self.live_weights, self.content_version = self._next_weights, self._next_content
        now = time.perf_counter()
        self._record(
            "refresh",
            step,
            epoch=epoch,
            encoder_step=encoder_step,
            published_step=encoder_step,
            seconds_total=now - self._staged_at,
            seconds_stood_still=self._stood_still + (now - started),
            mode=self._settings.refresh,
            memory_bytes=dict(self._memory.info().bytes),
        )

    def _fail(self, step: int, failure: str) -> None:
        self._failure = failure
        self._drop_staged()
        message = f"refresh failed, epoch {self.epoch} goes on serving: {failure}"
        self._record("event", step, message=message)
        self._say(message)

    def _drop_staged(self) -> None:
        if self._staged is None:
            return
        staged, self._staged = self._staged, None
        try:
            self._memory.release(staged)
        except MemoryServerError as error:
            # A memory that could not stage it may not be able to forget it either; training needs
            # only the epoch that serves.
            self._say(f"epoch {staged} of the memory is not released: {error}")
