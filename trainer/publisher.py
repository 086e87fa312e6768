"""Rank 0's dealings with the memory: one epoch is staged at a time, switched to, or given up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from memory_server.api import Memory, StageState, StageStatus
from memory_server.errors import MemoryServerError, UnknownEpoch
from memory_server.kept_pin import KeptPin
from trainer.asking import Asked
from trainer.drift import KeyDrift
from trainer.errors import TrainingError

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_GIVE_UP_S = 10.0
_SEAL_TIMEOUT_S = 24 * 3600.0
# While it waits for keys it looks this often whether someone asked the run to stop.
_WAIT_SLICE_S = 0.5
_LOOK_FOR_OTHERS_EVERY_S = 1.0
_ACTIVATE_ATTEMPTS, _ACTIVATE_PAUSE_S = 3, 0.5


class Publisher:
    """Hands weights to the memory and makes what comes of them live. Not collective.

    Training waits for nothing here but the switch, or where it asks for it (`wait`): a thread hands
    the weights over and asks how far the keys are.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        pin: KeptPin | None,
        live_content: str,
        live_weights: dict[str, Tensor],
        content_version: Callable[[int], str | None],
        stop_requested: Callable[[], bool],
        record: Callable[..., None],
        say: Callable[[str], None],
        drift: KeyDrift | None = None,
    ) -> None:
        """Start with nothing staged; see `MemoryFollower`.

        Args:
            pin: on the epoch that is searched; None on ranks that lead nothing.
            drift: tells how far each refresh moves the keys; None: that is not told.
        """
        self._memory, self._record, self._say = memory, record, say
        self._content_version, self._stop_requested = content_version, stop_requested
        self.content_version, self.live_weights = live_content, live_weights
        self._next_content, self._next_weights = live_content, live_weights
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._staged: Future[int] | None = None
        self._drift = drift
        self._moved: Future[dict[str, float]] | None = None
        self._status: Asked[StageStatus] | None = None
        self._look_for_others()
        self._pin = pin
        self._older_pin: KeptPin | None = None
        self._rebased = False  # a refresh came to be of content that someone else made live
        self.edited = False  # someone else switched the memory, and the ranks are to follow
        self.failure, self.failures_in_a_row = "", 0

    @property
    def staging(self) -> bool:
        """Whether an epoch is being staged: it may be switched to, or given up."""
        return self._staged is not None

    def stage(self, step: int, weights: dict[str, Tensor]) -> None:
        """Begin an epoch of these weights; whether the memory took them is told by `look`."""
        content = self._content_version(step)
        staged = self._pool.submit(
            self._memory.stage, encoder_step=step, weights=weights, content_version=content
        )
        self._staged = staged
        self._status = Asked(
            self._pool, lambda: self._memory.staging(staged.result()), every_s=_LOOK_EVERY_S
        )
        if self._drift is not None:
            self._moved = self._pool.submit(self._drift.between, self.live_weights, weights)
        self._next_weights = weights
        self._next_content = content or self.content_version

    def look(self) -> tuple[StageState, str]:
        """How far the staged epoch is, as of the last answer: (state, why it failed).

        The memory is asked a few times a second at most; in between it is "encoding".
        """
        assert self._status is not None
        try:
            status = self._status.look()
        except MemoryServerError as error:
            return "failed", str(error)
        return ("encoding", "") if status is None else (status.state, status.error or "")

    def wait(self) -> tuple[StageState, str]:
        """Wait until the staged epoch is sealed or failed; still encoding means: asked to stop."""
        assert self._staged is not None
        deadline = time.monotonic() + _SEAL_TIMEOUT_S
        while not self._stop_requested():
            try:
                if wait([self._staged], timeout=_WAIT_SLICE_S).done:
                    self._memory.wait_sealed(self._staged.result(), _WAIT_SLICE_S)
                    return "sealed", ""
            except TimeoutError as error:
                if time.monotonic() >= deadline:
                    return "failed", str(error)
            except MemoryServerError as error:
                return "failed", str(error)
        return "encoding", ""

    def activate(self) -> int:
        """Make the staged epoch the memory's live one.

        Returns:
            The epoch that is live now: another one if the content was edited meanwhile.

        Raises:
            TrainingError: not every shard switched.
        """
        assert self._staged is not None
        staged = self._staged.result()
        live = self._activate(staged)
        self._pin_also(live)
        self._staged = self._status = None
        self.failures_in_a_row = 0
        self.live_weights, self.content_version = self._next_weights, self._next_content
        if live != staged:
            # The keys were made again for the content that someone else made live meanwhile.
            self.content_version = self._content_of_live()
            self._rebased = self.content_version != self._next_content
        return live

    def _content_of_live(self) -> str:
        try:
            return self._memory.info().content_version
        except MemoryServerError as error:
            raise TrainingError(
                f"the memory does not tell which content its live epoch has ({error}), and a "
                "checkpoint must name it; what was committed before is kept, go on from it with "
                "--resume"
            ) from error

    def edited_by_others(self, serving: int, encoder_step: int) -> int | None:
        """The live epoch when someone else edited the content; it is pinned.

        Keys of other weights are not followed: whoever made them trains another model on this
        memory, and the pinned epoch goes on answering here. The memory is asked once a second at
        most, in the background.
        """
        try:
            info = self._others.look()
            if info is None or info.epoch == serving:
                return None
            if info.encoder_step != encoder_step:
                log.warning(
                    "epoch %d of the memory has keys of step %d, which another client published; "
                    "training goes on with epoch %d",
                    info.epoch,
                    info.encoder_step,
                    serving,
                )
                return None
            self._pin_also(info.epoch)
        except MemoryServerError as error:
            # Searches go on with the pinned epoch; it is looked again at a later step.
            log.warning("the memory could not be asked for its live epoch: %s", error)
            return None
        self.content_version = info.content_version
        self.edited = True
        return info.epoch

    def moved(self) -> dict[str, float]:
        """How far the refresh that is live now has moved the keys, if that is known by now."""
        if self._moved is None or not self._moved.done() or self._moved.exception() is not None:
            return {}
        return self._moved.result()

    def let_go(self, step: int, previous: int) -> dict[str, dict[str, int]]:
        """Free the epoch before; no rank searches it any more: all have finished the step before.

        Returns:
            `memory_bytes` for the metrics line, if the memory could tell.
        """
        self._look_for_others()
        if self.edited or self._rebased:
            self.edited = self._rebased = False
            self._tell(step, f"the memory was edited: content {self.content_version} from here on")
        if self._older_pin is not None:
            self._older_pin.close()
            self._older_pin = None
        try:
            self._memory.release(previous)
        except UnknownEpoch:
            pass  # whoever edited the memory released it; our pin was all that held it
        except MemoryServerError as error:
            # It takes memory until the run ends; training does not hang on it.
            self._tell(step, f"epoch {previous} of the memory is not released: {error}")
            return {}
        try:
            return {"memory_bytes": dict(self._memory.info().bytes)}
        except MemoryServerError as error:
            self._tell(step, f"the memory does not say what it holds: {error}")
            return {}

    def close(self) -> None:
        """Let go of the epochs that are read."""
        # The memory may be a server that outlives this run: what nobody will switch to must not
        # take its room. Not waited for long, since it may be the memory that has ended the run.
        if self._staged is not None:
            gone = threading.Thread(target=self.give_up, name="give-up-epoch", daemon=True)
            gone.start()
            gone.join(_GIVE_UP_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for pin in (self._pin, self._older_pin):
            if pin is not None:
                pin.close()

    def fail(self, step: int, reason: str, *, serving: int) -> None:
        """Note and tell that a refresh failed; what is staged is given up."""
        self.failure = reason
        self.failures_in_a_row += 1
        self.give_up()
        self._tell(step, f"refresh failed, epoch {serving} goes on serving: {reason}")

    def give_up(self) -> None:
        """Release the staged epoch, if there is one."""
        if self._staged is None:
            return
        given_up, self._staged, self._status = self._staged, None, None
        try:
            staged = given_up.result()
        except MemoryServerError:
            return  # the memory never took it
        try:
            self._memory.release(staged)
        except MemoryServerError as error:
            # A memory that could not stage it may not be able to forget it either; training needs
            # only the epoch that serves.
            self._say(f"epoch {staged} of the memory is not released: {error}")

    def _look_for_others(self) -> None:
        """From now on: an answer that is under way is of before a switch."""
        self._others = Asked(self._pool, self._memory.info, every_s=_LOOK_FOR_OTHERS_EVERY_S)

    def _pin_also(self, epoch: int) -> None:
        """Pin another epoch; the older pin is kept until every rank has switched."""
        if self._pin is not None and epoch == self._pin.epoch:
            return
        newer = KeptPin(self._memory, epoch)
        if self._older_pin is not None:
            self._older_pin.close()
        self._older_pin, self._pin = self._pin, newer

    def _activate(self, epoch: int) -> int:
        """Have all shards answer from an epoch; one that is restarting is given time."""
        for attempt in range(1, _ACTIVATE_ATTEMPTS + 1):
            try:
                return self._memory.activate(epoch)
            except MemoryServerError as error:
                if attempt == _ACTIVATE_ATTEMPTS:
                    raise TrainingError(
                        f"the memory's epoch {epoch} is ready, but in {attempt} attempts not every "
                        f"shard switched to it: {error}; what was committed before is kept, go on "
                        "from it with --resume, which starts the memory anew"
                    ) from error
                time.sleep(_ACTIVATE_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def _tell(self, step: int, message: str) -> None:
        self._record("event", step, message=message)
        self._say(message)
