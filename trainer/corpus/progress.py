"""How far a build is, for whoever shows it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TextIO

from tqdm import tqdm

Stage = Literal["checking", "counting", "tokenizer", "encoding", "writing"]


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """One report: `done` of `total` (None: not known) documents, or files when writing."""

    stage: Stage
    done: int
    total: int | None = None
    entries: int = 0
    sequences: int = 0


Report = Callable[[BuildProgress], None]


class ProgressBar:
    """Shows reports as one tqdm bar per stage; use as a context manager and pass as `progress`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, report: BuildProgress) -> None:
        if self._bar is None or report.stage != self._stage:
            self.__exit__()
            unit = " files" if report.stage in ("checking", "writing") else " documents"
            self._bar = tqdm(
                desc=f"corpus: {report.stage}", total=report.total, unit=unit, file=self._stream
            )
            self._stage = report.stage
        if report.entries:
            self._bar.set_postfix_str(
                f"{report.sequences:,} sequences, {report.entries:,} entries", refresh=False
            )
        self._bar.update(report.done - self._bar.n)
