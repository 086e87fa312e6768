"""Questions that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.asking import Asked


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_looking_never_waits_and_tells_an_answer_once(pool: ThreadPoolExecutor) -> None:
    may_answer = threading.Event()
    asked: list[int] = []

    def question() -> int:
        asked.append(len(asked))
        may_answer.wait(20)
        return 7

    answer = Asked(pool, question, every_s=3600.0)
    assert [answer.look() for _ in range(3)] == [None] * 3
    may_answer.set()
    told: list[int | None] = []

    def looked() -> bool:
        told.append(answer.look())
        return told[-1] is not None

    until(looked)
    assert told[-1] == 7
    assert answer.look() is None
    assert asked == [0], "asked again only after every_s"


def test_it_is_asked_again_when_it_is_time_and_what_it_raised_is_raised(
    pool: ThreadPoolExecutor,
) -> None:
    answers: list[int | Exception] = [ValueError("away"), 3]

    def question() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked = Asked(pool, question, every_s=0.0)
    told: list[object] = []

    def looked() -> bool:
        try:
            told.append(asked.look())
        except ValueError as error:
            told.append(str(error))
        return 3 in told

    until(looked)
    assert [one for one in told if one is not None] == ["away", 3]
