"""Signals that ask for an end: the first for a checkpoint and a clean one, the second at once.

Ctrl-C means that a person is done. SIGTERM and SIGUSR1 are how Slurm and Kubernetes take a machine
away from a job that is not done: the exit code then asks that it be queued again.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # sysexits.h calls it EX_TEMPFAIL: the same command may succeed later


class Stop:
    """What the signals have asked for so far.

    Attributes:
        number: of the last signal; 0: none yet.
        training: whether there is a step to save, so that the first signal only leaves `event` to
            be seen. At any other time a signal raises `Interrupted` at once.
        event: set by the first signal.
    """

    def __init__(self, *, requeue: bool = False) -> None:
        """`requeue`: the job can be gone on with, so preemption asks for that."""
        self._requeue = requeue
        self.signals = tuple(dict.fromkeys((*SIGNALS, *PREEMPTION))) if requeue else SIGNALS
        self.number = 0
        self.training = False
        self.event = threading.Event()

    def listen(self) -> None:
        """Make this the handler of the signals, as far as this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise what a clean-up routine of a library has swallowed; call between long steps."""
        if self.event.is_set():
            raise Interrupted(self.number, self.exit_code())

    def exit_code(self) -> int:
        """REQUEUE, or 128 and the last signal's number."""
        if self._requeue and self.number in PREEMPTION:
            return REQUEUE
        # Ray's compiled calls turn our exception into a plain interrupt, as Ctrl-C makes one.
        return 128 + (self.number or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number != 0, number
        self.event.set()
        if again or not self.training:
            raise Interrupted(number, self.exit_code())


@contextmanager
def stop_on_signals(*, requeue: bool = False) -> Iterator[Stop]:
    """Listen while the block runs; what listened before does so again afterwards."""
    stop = Stop(requeue=requeue)
    before = {number: signal.getsignal(number) for number in stop.signals}
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
