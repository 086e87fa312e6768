"""The coordinator's book, kept: every change is on disk before it is in force."""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator

from memory_server.actors.orders import Orders, orders_of
from memory_server.actors.server_book import ServerBook
from memory_server.actors.state import StateDirectory
from memory_server.errors import MemoryServerError

log = logging.getLogger(__name__)


class KeptBook:
    """A `ServerBook` and its state directory. Thread-safe."""

    def __init__(self, state: StateDirectory, *, booked: Callable[[str], None]) -> None:
        """Wait for the directory, since the coordinator before this one may still be dying, and
        read the book.

        Args:
            booked: called after every change with its name, before any shard can know of it.

        Raises:
            StateNotFound, StateDamaged, StateUnusable.
        """
        self.state = state
        self.lock = threading.Lock()
        self._booked = booked
        self._held = contextlib.ExitStack()
        while True:
            try:
                self._held.enter_context(state.locked())
                break
            except MemoryServerError as error:
                log.warning("waiting for the coordinator before this one: %s", error)
        try:
            self._server = state.load(now=time.monotonic())
            state.sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory."""
        self._held.close()

    @contextlib.contextmanager
    def read(self) -> Iterator[ServerBook]:
        """The book as it is; not to be changed."""
        with self.lock:
            yield self._server

    @contextlib.contextmanager
    def change(self, what: str) -> Iterator[ServerBook]:
        """A draft to be changed; if the block raises, or the disk does, nothing has changed."""
        with self.lock:
            draft = copy.deepcopy(self._server)
            yield draft
            if draft == self._server:
                return
            draft.revision += 1
            draft.tidy()
            self.state.save(draft)
            self._server = draft
            try:
                self.state.tidy(draft)
            except (MemoryServerError, OSError) as error:  # the change is booked all the same
                log.warning("what is not needed any more stays until the next change: %s", error)
        self._booked(what)

    def copied(self) -> ServerBook:
        """A copy, for reading at leisure."""
        with self.lock:
            return copy.deepcopy(self._server)

    def orders(self) -> Orders:
        """What the shards have to hold."""
        with self.lock:
            return orders_of(self._server.epochs, self._server.revision)

    def joined(self, replica: str) -> Orders:
        """Count that a replica came up, and give it its orders. No order changes by it."""
        with self.lock:
            self._server.joins[replica] = self._server.joins.get(replica, 0) + 1
            self.state.save(self._server)
            return orders_of(self._server.epochs, self._server.revision)

    def renew(self, pin: int) -> None:
        """Begin a pin's lease anew. Not written down: after a restart every lease begins anew."""
        with self.lock:
            lease_s = self._server.leases.get(pin, 0.0)
            self._server.epochs.renew(pin, lease_s, time.monotonic())
