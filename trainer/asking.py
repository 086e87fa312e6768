"""Questions to the memory that training does not wait for: asked by a thread, looked at later."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Asked(Generic[T]):
    """One question that is asked again and again. For one thread."""

    def __init__(self, pool: Executor, question: Callable[[], T], *, every_s: float) -> None:
        """Nothing is asked yet.

        Args:
            pool: whose threads ask.
            question: may block, and raise.
            every_s: seconds from one asking to the next, at least.
        """
        self._pool, self._question, self._every_s = pool, question, every_s
        self._asked_at = -every_s
        self._answer: Future[T] | None = None

    def look(self) -> T | None:
        """A new answer, once; None: there is none yet. Never blocks.

        Raises:
            What the question raised.
        """
        now = time.monotonic()
        if self._answer is None and now - self._asked_at >= self._every_s:
            self._asked_at = now
            self._answer = self._pool.submit(self._question)
        if self._answer is None or not self._answer.done():
            return None
        answer, self._answer = self._answer, None
        return answer.result()
