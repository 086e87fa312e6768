"""Seconds of calls on a CPU or a GPU: repeated until a time is used up, the first left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.planning.constants import Figure

FEWEST, MOST = 3, 15


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times calls on one device.

    Attributes:
        seconds_each: after which no call is repeated, beyond the fewest.
        processor_time: seconds are of this process's threads on processors, not of the wall: for
            one thread beside other work.
    """

    device: torch.device
    seconds_each: float
    processor_time: bool = False

    def now(self) -> float:
        """Seconds from some moment on."""
        return time.process_time() if self.processor_time else time.perf_counter()

    def wall(self, call: Callable[[], object]) -> Figure:
        """Seconds until the call's work is done, as a caller waits for it."""

        def once() -> float:
            self.synchronize()
            began = self.now()
            call()
            self.synchronize()
            return self.now() - began

        return self.repeated(once)

    def on_device(self, call: Callable[[], object]) -> Figure:
        """Seconds that the device works, by its own events; of a CPU, wall seconds."""
        if self.device.type != "cuda":
            return self.wall(call)

        def once() -> float:
            before = torch.cuda.Event(enable_timing=True)
            after = torch.cuda.Event(enable_timing=True)
            with torch.cuda.device(self.device):
                before.record()
                call()
                after.record()
            after.synchronize()
            return float(max(before.elapsed_time(after), 1e-6)) / 1000

        return self.repeated(once)

    def repeated(self, once: Callable[[], float]) -> Figure:
        """What several calls return; one more before them is left out."""
        once()
        spent: list[float] = []
        began = time.perf_counter()
        while len(spent) < FEWEST or (
            len(spent) < MOST and time.perf_counter() - began < self.seconds_each
        ):
            spent.append(max(once(), 1e-9))
        return Figure.of(spent)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
