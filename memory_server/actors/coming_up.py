"""How an actor comes up. Ray never starts one again whose constructor raises."""

import logging
import threading
from collections.abc import Callable

from memory_server.errors import MemoryServerError

log = logging.getLogger(__name__)

AGAIN_AFTER_S = 0.5
AGAIN_AT_MOST_S = 30.0


class ComingUp:
    """Begins at once, and again in the background after every failure, whatever it is. Until it
    has begun, callers are told the reason of the newest failure."""

    def __init__(
        self, begin: Callable[[], None], what: str, *, again_after_s: float = AGAIN_AFTER_S
    ) -> None:
        """
        Args:
            begin: leaves nothing behind when it raises.
            what: named in messages.
        """
        self._begin, self._what, self._pause_s = begin, what, again_after_s
        self._ended = threading.Event()
        self._reason: Exception | None = None
        if not self._try():
            threading.Thread(target=self._go_on, name="coming-up", daemon=True).start()

    @property
    def is_up(self) -> bool:
        return self._reason is None

    def check(self) -> None:
        """Raises MemoryServerError, ValueError: what keeps it from working."""
        if self._reason is not None:
            raise self._reason

    def end(self) -> None:
        """Do not try any more."""
        self._ended.set()

    def _try(self) -> bool:
        try:
            self._begin()
        except Exception as error:
            log.warning("%s cannot start: %s: %s", self._what, type(error).__name__, error)
            self._reason = error
            # Others may not be known, or not be readable, where the caller is.
            if not isinstance(error, MemoryServerError | ValueError):
                self._reason = MemoryServerError(
                    f"{self._what} cannot start: {type(error).__name__}: {error}; it tries again"
                )
            return False
        self._reason = None
        return True

    def _go_on(self) -> None:
        while not self._ended.wait(self._pause_s):
            if self._try():
                return
            self._pause_s = min(2 * self._pause_s, AGAIN_AT_MOST_S)
