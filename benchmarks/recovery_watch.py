"""When steps and answers come, watched from outside while something dies."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch

from memory_server.actors.client import RayMemory
from memory_server.errors import MemoryServerError


class Arrivals:
    """Moments at which something came, noted by a thread for as long as the block lasts."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def count(self) -> int:
        return len(self.moments)

    def longest_pause(self, since: float, until: float) -> float:
        """Seconds without an arrival, at most, between two moments."""
        within = [moment for moment in list(self.moments) if since <= moment <= until]
        times = [since, *within, until]
        return max(later - earlier for earlier, later in pairwise(times))

    def moves(self, *, since: float, pause_s: float) -> bool:
        """Whether after `since` it has come for as long as `pause_s` much as it did before."""
        now = time.monotonic()
        usual = 3 * self.longest_pause(since - pause_s, since)
        return now - since > pause_s and self.longest_pause(now - pause_s, now) <= usual

    def _run(self) -> None:
        raise NotImplementedError


class Steps(Arrivals):
    """The training steps that a run writes to its metrics, one line each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._size, self._number = path, 0, -1
        self.steps: list[int] = []

    @property
    def step(self) -> int:
        """The newest."""
        return self.steps[-1]

    def again(self, reached: int, *, since: float) -> int:
        """How far behind `reached` the steps began again after a moment; 0 if they went on."""
        moments = list(self.moments)
        later = [s for m, s in zip(moments, self.steps[: len(moments)], strict=True) if m > since]
        return max(0, reached - min(later) + 1)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            try:
                size = self._path.stat().st_size
                if size == self._size:
                    continue
                with self._path.open("rb") as file:
                    file.seek(max(0, size - 8192))
                    lines = file.read().splitlines(keepends=True)[-8:]
            except OSError:
                continue  # there is none yet
            self._size = size
            whole = [json.loads(x) for x in lines if x.startswith(b"{") and x.endswith(b"}\n")]
            train = [line["step"] for line in whole if line["kind"] == "train"]
            if train and train[-1] != self._number:
                self._number = train[-1]
                self.steps.append(self._number)
                self.moments.append(time.monotonic())


class Answers(Arrivals):
    """The answers that a client gets which searches one query after the other."""

    def __init__(self, memory: RayMemory) -> None:
        super().__init__()
        self._memory = memory
        self._query = torch.ones(1, memory.info().key_width)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._memory.close()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                self._memory.search(self._query, 3)
            except MemoryServerError:
                continue  # the pause goes on
            self.moments.append(time.monotonic())
