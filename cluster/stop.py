"""SIGINT and SIGTERM: the first asks for a checkpoint and a clean end, the second ends at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What the signals have asked for so far.

    Attributes:
        number: of the last signal; 0: none yet.
        training: whether there is a step to save, so that the first signal only leaves `event` to
            be seen. At any other time a signal raises `Interrupted` at once.
        event: set by the first signal.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self.event = threading.Event()

    def listen(self) -> None:
        """Make this the handler of both signals, as far as this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise what a clean-up routine of a library has swallowed; call between long steps."""
        if self.event.is_set():
            raise Interrupted(self.number)

    def exit_code(self, interruption: KeyboardInterrupt) -> int:
        """128 and the signal's number. Ray's compiled calls turn ours into a plain interrupt."""
        if isinstance(interruption, Interrupted):
            return interruption.exit_code
        return 128 + (self.number or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number != 0, number
        self.event.set()
        if again or not self.training:
            raise Interrupted(number)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Listen while the block runs; what listened before does so again afterwards."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        # An interrupt that fell into a destructor is noticed by `check`; nobody wants its trace.
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    sys.unraisablehook = report
    stop.listen()
    try:
        yield stop
    finally:
        sys.unraisablehook = hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
