"""A disk that takes no line costs the line, not the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.loop import _Run


def test_a_line_that_is_lost_is_said_once_until_there_is_room_again() -> None:
    full, written = True, []

    def write(kind: str, step: int, **numbers: object) -> None:
        if full:
            raise OSError(28, "No space left on device")
        written.append((kind, step))

    said: list[str] = []
    run: Any = SimpleNamespace(
        metrics=SimpleNamespace(path="run/metrics.jsonl", write=write),
        control=SimpleNamespace(say=said.append),
        _line_lost=False,
    )
    for step in (1, 2):
        _Run._record(run, "train", step, loss=1.0)
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "training goes on" in said[0]
    full = False
    _Run._record(run, "train", 3)
    full = True
    _Run._record(run, "train", 4)
    assert (len(said), written) == (2, [("train", 3)])
