"""Measuring without waiting: wall seconds of named parts, and means that stay on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class StepTimer:
    """Wall seconds of the named parts of a step, summed until they are taken.

    Only the host's clock is read, so nothing waits for the device: a part that queues kernels
    counts the queueing, a part that waits for an answer (retrieval) counts the wait.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._started = clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's seconds to ``name``, also when it raises; parts may nest."""
        start = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out, its seconds and its parts: what is no part of a training step."""
        before, start = dict(self._seconds), self._clock()
        try:
            yield
        finally:
            self._seconds = before
            self._started += self._clock() - start

    def take(self) -> tuple[dict[str, float], float]:
        """Return (seconds by part, seconds in all since the last take) and start afresh."""
        now = self._clock()
        seconds, total = self._seconds, now - self._started
        self._seconds, self._started = {}, now
        return seconds, total


class RunningMeans:
    """Means of step values between two log lines, with one read of the device at the end.

    ``add`` only queues an addition; the device is waited for, and other ranks are asked, once
    per log line and not once per step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, *, weight: float | Tensor = 1.0, **values: float | Tensor) -> None:
        """Add one step's values.

        Args:
            weight: how much the values count, e.g. the number of masked positions that a mean
                was taken over. A weight of 0 counts for nothing, whatever its value.
            **values: numbers or 0-dimensional tensors; detached here, not read.
        """
        for name, value in values.items():
            value_0 = torch.as_tensor(value).detach().to(torch.float64)
            weight_0 = torch.as_tensor(weight, device=value_0.device).detach().to(torch.float64)
            # The mean over no masked position is 0/0: it must not spoil the sum.
            part = torch.where(weight_0 == 0, torch.zeros_like(value_0), value_0 * weight_0)
            if name in self._sums:
                self._sums[name] = self._sums[name] + part
                self._counts[name] = self._counts[name] + weight_0
            else:
                self._sums[name], self._counts[name] = part, weight_0

    def take(self, all_reduce: Callable[[Tensor], object] | None = None) -> dict[str, float]:
        """Return the weighted means by name and start afresh; waits for the device.

        Args:
            all_reduce: sums a float64 tensor [2, names] over the ranks in place, e.g.
                ``torch.distributed.all_reduce``. Then this is collective, and every rank must
                have added the same names.

        Returns:
            The means; NaN for a name whose weights sum to 0.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        device = self._sums[names[0]].device
        totals = torch.stack(
            [
                torch.stack([self._sums[name].to(device) for name in names]),
                torch.stack([self._counts[name].to(device) for name in names]),
            ]
        )
        self._sums, self._counts = {}, {}
        if all_reduce is not None:
            all_reduce(totals)
        means: list[float] = (totals[0] / totals[1]).tolist()
        return dict(zip(names, means, strict=True))
