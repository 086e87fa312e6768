"""How a rank and the process that watches it talk: a request to stop, and the newest numbers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple


class Polled(NamedTuple):
    """The newest numbers, the messages since the last poll, and a count that grows with work."""

    line: dict[str, Any]
    messages: list[str]
    pulse: int


class Control:
    """Shared between the thread that trains and the one that answers the driver."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._latest: dict[str, Any] = {}
        self._messages: list[str] = []
        self._pulse = 0

    def request_stop(self) -> None:
        """Ask for a checkpoint and a clean end at the next step boundary."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop.is_set()

    def beat(self) -> None:
        """Note that something moves: a step, a look at a refresh, a file that is written."""
        with self._lock:
            self._pulse += 1

    def report(self, line: Mapping[str, Any]) -> None:
        """Keep the newest numbers of the step."""
        with self._lock:
            self._latest.update(line)
            self._pulse += 1

    def say(self, message: str) -> None:
        """Leave a message for the person who watches."""
        with self._lock:
            self._messages.append(message)

    def poll(self) -> Polled:
        """What happened since the last poll."""
        with self._lock:
            messages, self._messages = self._messages, []
            return Polled(dict(self._latest), messages, self._pulse)
