"""The machines' parts as events: cores that processes share, and a replica of a shard.

A replica is what `memory_server.wire.search_server` makes of it: one thread that answers, a bounded
queue of which it takes as many searches at once as fit, and a few threads for relayed searches.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import simpy

Process = Generator[simpy.Event, Any, Any]
Word = Literal["answer", "overloaded", "lost"]
Answer = Callable[[Word], None]


def after(env: simpy.Environment, seconds: float, act: Callable[[], object]) -> None:
    """Call it so much later; cheaper than a process."""

    def called(event: simpy.Event) -> None:
        act()

    timeout = env.timeout(seconds)
    assert timeout.callbacks is not None
    timeout.callbacks.append(called)


class Cores:
    """Cores that all who work share evenly, as an operating system has it; 0: one for each."""

    def __init__(self, env: simpy.Environment, cores: int = 0) -> None:
        self._env, self._cores = env, cores
        # Everyone at work gets on equally fast: `_done` is how far one who always was there is.
        self._done, self._at = 0.0, env.now
        self._working: list[tuple[float, int, simpy.Event]] = []
        self._numbers = count()
        self._wake = 0

    def work(self, seconds: float) -> simpy.Event:
        """Happens when so many seconds on a core of one's own are done."""
        if not self._cores:
            return self._env.timeout(seconds)
        self._get_on()
        ready = self._env.event()
        heapq.heappush(self._working, (self._done + seconds, next(self._numbers), ready))
        self._look_again()
        return ready

    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._working)) if self._working else 0.0

    def _get_on(self) -> None:
        self._done += (self._env.now - self._at) * self._speed()
        self._at = self._env.now

    def _look_again(self) -> None:
        self._wake += 1
        if self._working:
            mine = self._wake
            left = max(0.0, self._working[0][0] - self._done) / self._speed()
            after(self._env, left, lambda: self._finish(mine))

    def _finish(self, mine: int) -> None:
        if mine != self._wake:
            return  # someone came meanwhile, and set another time
        self._get_on()
        # The first is done; the clock's rounding must not say otherwise, or it would never end.
        self._done = max(self._done, self._working[0][0])
        while self._working and self._working[0][0] <= self._done + 1e-12:
            heapq.heappop(self._working)[2].succeed()
        self._look_again()


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What all replicas have in common.

    Attributes:
        search_s: draws the seconds of one search of so many queries.
        encode_s: seconds that new keys take while nothing is searched.
        refresh_slowdown, encode_share: of a search while keys are made, and of them meanwhile.
    """

    search_s: Callable[[int], float]
    queue_limit: int
    max_batch_rows: int
    relays_at_once: int
    encode_s: float = 0.0
    refresh_slowdown: float = 1.0
    encode_share: float = 1.0


@dataclass
class Replica:
    """One replica of one shard.

    Attributes:
        cores: for its searches. side_cores: for what its other threads do; Python lets one of them
            work at a time.
        up: whether it answers. silent: it is down, and nobody was told so. life: counts deaths and
            returns: what was asked in one is not answered in another.
        back: happens when it is up again.
        searches, joined: as the real server counts them.
    """

    env: simpy.Environment
    settings: ReplicaSettings
    cores: Cores
    side_cores: Cores
    up: bool = True
    silent: bool = False
    life: int = 0
    searches: int = 0
    joined: int = 0
    refused: int = 0
    _queue: deque[tuple[int, Answer]] = field(default_factory=deque)
    _at_work: list[tuple[int, Answer]] = field(default_factory=list)
    _busy: bool = False
    _encoded_at: float | None = None

    def __post_init__(self) -> None:
        self.back = self.env.event()
        self.relays = simpy.Resource(self.env, self.settings.relays_at_once)

    def ask(self, rows: int, answer: Answer) -> None:
        """A search arrives. `answer` is called once, or never if its node is lost."""
        if not self.up:
            if not self.silent:
                answer("lost")
            return
        if len(self._queue) >= self.settings.queue_limit:
            self.refused += 1
            answer("overloaded")
            return
        self._queue.append((rows, answer))
        if not self._busy:
            self._busy = True
            self.env.process(self._answer_all(self.life))

    def _answer_all(self, life: int) -> Process:
        # What arrives at the same instant as the first comes behind it, not with it: the thread
        # that receives hands over one search at a time.
        while self._queue and life == self.life:
            rows = self._take_joinable()
            self.searches += 1
            self.joined += len(self._at_work) > 1
            seconds = self.settings.search_s(rows)
            if self.encoding:
                seconds *= self.settings.refresh_slowdown
            began = self.env.now
            yield self.cores.work(seconds)
            if life != self.life:
                return
            self._delay_encoding(began)
            done, self._at_work = self._at_work, []
            for _, answer in done:
                answer("answer")
        if life == self.life:
            self._busy = False

    def _take_joinable(self) -> int:
        self._at_work = [self._queue.popleft()]
        rows = self._at_work[0][0]
        while self._queue and rows + self._queue[0][0] <= self.settings.max_batch_rows:
            self._at_work.append(self._queue.popleft())
            rows += self._at_work[-1][0]
        return rows

    @property
    def encoding(self) -> bool:
        """Whether new keys are being made."""
        return self._encoded_at is not None and self.env.now < self._encoded_at

    def encode(self) -> None:
        """Begin to make new keys."""
        self._encoded_at = self.env.now + self.settings.encode_s

    def encoded(self) -> bool:
        """Whether the new keys are there."""
        return self.up and (self._encoded_at is None or self.env.now >= self._encoded_at)

    def _delay_encoding(self, began: float) -> None:
        if self._encoded_at is not None and began < self._encoded_at:
            self._encoded_at += (self.env.now - began) * (1 - self.settings.encode_share)

    def fail(self, *, silent: bool) -> None:
        """It dies: its process, which the others notice at once, or its whole node."""
        self.up, self.silent, self._busy = False, silent, False
        self.life += 1
        lost = [*self._at_work, *self._queue]
        self._at_work = []
        self._queue.clear()
        if not silent:
            for _, answer in lost:
                answer("lost")

    def recover(self) -> None:
        """A new process serves in its place; keys that were being made are made anew."""
        self.up, self.silent = True, False
        self.life += 1
        if self._encoded_at is not None:
            self.encode()
        back, self.back = self.back, self.env.event()
        back.succeed()
