"""The one line that a person watches while a run trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

BAR = "{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress:
    """A progress bar on a terminal, a plain line every few seconds anywhere else.

    It shows the newest numbers that it was given, so a caller may report every step
    (``update({"step": 7})``) and the loss only now and then.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        plain_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at a step, which is not 0 after a resume.

        Args:
            total_steps: the step at which training ends.
            start_step: the last step already done; the time left is estimated from the steps
                after it.
            stream: where to show it, standard error when None.
            plain_every_s: least seconds between two plain lines.
            clock: seconds that only grow; for tests.

        Raises:
            ValueError: the start is not in 0..total_steps.
        """
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step is {start_step}; allowed: 0 to {total_steps}")
        self.total_steps = total_steps
        self.start_step = start_step
        self.step = start_step
        self._stream = sys.stderr if stream is None else stream
        self._every_s = plain_every_s
        self._clock = clock
        self._started = clock()
        self._printed_at: float | None = None
        self._printed_step = start_step
        self._numbers: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=BAR,
                leave=True,
            )

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a step: a dict with ``step`` and any of the numbers of a train line."""
        self._numbers.update({k: v for k, v in line.items() if k != "non_finite"})
        for name in line.get("non_finite", {}):
            self._numbers[name] = float("nan")
        step = int(line["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(describe(self._numbers), refresh=False)
            self._bar.update(step - self.step)
            self.step = step
            return
        self.step = step
        now = self._clock()
        if self._printed_at is None or now - self._printed_at >= self._every_s:
            self._print_plain(now)

    def note(self, message: str) -> None:
        """Print one line of its own, above the bar."""
        if self._bar is not None:
            tqdm.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def seconds_left(self) -> float | None:
        """Seconds to the last step at the pace since the start; None before the first step."""
        done = self.step - self.start_step
        if done <= 0:
            return None
        return (self._clock() - self._started) / done * (self.total_steps - self.step)

    def close(self) -> None:
        """End the line; a plain one shows the last step if it has not been shown."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self.step > self._printed_step:
            self._print_plain(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_plain(self, now: float) -> None:
        self._printed_at = now
        self._printed_step = self.step
        share = 100 * self.step / max(1, self.total_steps)
        parts = [f"step {self.step}/{self.total_steps} ({share:.0f} %)"]
        numbers = describe(self._numbers)
        if numbers:
            parts.append(numbers)
        left = self.seconds_left()
        if left is not None and self.step < self.total_steps:
            parts.append(f"{tqdm.format_interval(left)} left")
        print(" · ".join(parts), file=self._stream, flush=True)


def describe(numbers: Mapping[str, Any]) -> str:
    """The numbers of a train line in one short phrase; what is absent is left out."""
    shapes = (
        ("loss", "loss {:.3f}"),
        ("sequences_per_s", "{:.1f} seq/s"),
        ("retrieval_ms", "retrieval {:.1f} ms"),
        ("staleness_steps", "stale {:.0f}"),
        ("epoch", "memory epoch {:.0f}"),
    )
    found = ((shape, numbers.get(name)) for name, shape in shapes)
    return " · ".join(shape.format(value) for shape, value in found if value is not None)
