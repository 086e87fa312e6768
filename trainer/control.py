"""How a rank and the process that watches it talk: a request to stop, and the newest numbers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any


class Control:
    """Shared between the thread that trains and the one that answers the driver."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._latest: dict[str, Any] = {}
        self._messages: list[str] = []

    def request_stop(self) -> None:
        """Ask for a checkpoint and a clean end at the next step boundary."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop.is_set()

    def report(self, line: Mapping[str, Any]) -> None:
        """Keep the newest numbers of the step."""
        with self._lock:
            self._latest.update(line)

    def say(self, message: str) -> None:
        """Leave a message for the person who watches."""
        with self._lock:
            self._messages.append(message)

    def poll(self) -> tuple[dict[str, Any], list[str]]:
        """The newest numbers, and the messages since the last poll."""
        with self._lock:
            messages, self._messages = self._messages, []
            return dict(self._latest), messages
