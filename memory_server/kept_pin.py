"""A pin that stays: renewed in the background for as long as its holder lives."""

import logging
import threading
from typing import Self

from memory_server.api import Memory
from memory_server.errors import MemoryServerError, UnknownEpoch

log = logging.getLogger(__name__)

LEASE_S = 60.0
RENEWALS_PER_LEASE = 3


class KeptPin:
    """Holds an epoch until it is closed or this process ends; see `Memory.pin`."""

    def __init__(
        self, memory: Memory, epoch: int | None = None, *, lease_s: float = LEASE_S
    ) -> None:
        """Pin an epoch, by default the live one. Raises what `Memory.pin` raises."""
        self._memory, self._lease_s = memory, lease_s
        self._pin = memory.pin(epoch, lease_s=lease_s)
        self._pause_s = lease_s / RENEWALS_PER_LEASE
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="pin-keeper", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        return self._pin.epoch

    def close(self) -> None:
        """Let go. A second call does nothing, nor does one when the memory is gone."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._pin.close()
        except MemoryServerError as error:
            # The lease ends by itself.
            log.info("pin on epoch %d could not be closed: %s", self.epoch, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _renew(self) -> None:
        while not self._closed.wait(self._pause_s):
            try:
                self._pin.renew()
            except UnknownEpoch:
                if not self._pin_again():
                    return
            except Exception as error:  # whatever it was, the next try may succeed
                log.warning("pin on epoch %d not renewed: %s", self.epoch, error)

    def _pin_again(self) -> bool:
        """Take the epoch anew after the lease ended, if it is there still."""
        try:
            self._pin = self._memory.pin(self.epoch, lease_s=self._lease_s)
        except MemoryServerError as error:
            log.error("epoch %d is not held for its reader any more: %s", self.epoch, error)
            return False
        return True
