"""The progress line on a terminal and in a log file."""

import io

import pytest

from trainer.progress import Progress

LINE = {
    "kind": "train",
    "step": 110,
    "loss": 3.14159,
    "sequences_per_s": 96.04,
    "retrieval_ms": 12.34,
    "staleness_steps": 40,
    "epoch": 3,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_plain_lines_now_and_then_and_always_the_last() -> None:
    now, out = [0.0], io.StringIO()
    with Progress(200, start_step=100, stream=out, plain_every_s=30, clock=lambda: now[0]) as bar:
        for step in range(101, 131):
            now[0] += 2.0
            bar.update({**LINE, "step": step})
    text = out.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["101/200", "116/200", "130/200"]
    assert lines[0] == (
        "step 101/200 (50 %) · loss 3.142 · 96.0 seq/s · retrieval 12.3 ms · stale 40"
        " · memory epoch 3 · 03:18 left"
    )


def test_time_left_counts_only_the_steps_since_the_resume() -> None:
    now = [5.0]
    bar = Progress(200, start_step=100, stream=io.StringIO(), clock=lambda: now[0])
    assert bar.seconds_left() is None
    now[0] += 20.0
    bar.update({"step": 110})
    assert bar.seconds_left() == pytest.approx(180.0)


def test_a_terminal_gets_a_bar_that_starts_at_the_resumed_step() -> None:
    out = Terminal()
    with Progress(200, start_step=100, stream=out) as bar:
        bar.update(LINE)
        bar.note("memory epoch 3 is live")
    text = out.getvalue()
    assert "step 100/200" in text.split("\r")[1]
    assert "step 110/200" in text
    assert "loss 3.142" in text
    assert "retrieval 12.3 ms" in text
    assert "memory epoch 3 is live\n" in text


def test_a_step_without_numbers_keeps_those_shown_and_nan_is_visible() -> None:
    out = io.StringIO()
    with Progress(4, stream=out, plain_every_s=0) as bar:
        bar.update({"step": 1, "loss": 2.0})
        bar.update({"step": 2})
        bar.update({"step": 3, "loss": None, "non_finite": {"loss": "nan"}})
    lines = out.getvalue().splitlines()
    assert "loss 2.000" in lines[1]
    assert "loss nan" in lines[2]


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 5"):
        Progress(5, start_step=6, stream=io.StringIO())
