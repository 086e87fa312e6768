"""Which replica is asked, and when a second one is. Times are given: no clock, no sleep."""

import pytest

from memory_server.wire.hedging import (
    FORGET_AFTER_S,
    PROBE_EVERY_S,
    SAMPLES,
    HedgeDelay,
    ReplicaBook,
)


def answered(book: ReplicaBook, replica: int, seconds: float, now: float) -> None:
    book.sent(0, replica)
    book.answered(0, replica, seconds, now)


def test_the_one_with_less_to_do_is_asked_and_then_the_faster() -> None:
    book = ReplicaBook([2])
    for replica, seconds in ((0, 0.010), (1, 0.012)):
        answered(book, replica, seconds, now=1.0)
    assert book.choose(0, [0, 1], now=1.0) == 0
    book.sent(0, 0)
    assert book.choose(0, [0, 1], now=1.0) == 1
    for _ in range(3):
        book.sent(0, 1)
    assert book.choose(0, [0, 1], now=1.0) == 0


def test_one_that_was_slow_long_ago_is_tried_again() -> None:
    book = ReplicaBook([2])
    answered(book, 0, 0.5, now=0.0)
    for tick in range(100):
        now = tick * FORGET_AFTER_S / 10
        answered(book, 1, 0.01, now)
        if book.choose(0, [0, 1], now) == 0:
            assert now > FORGET_AFTER_S
            return
    pytest.fail("it was never tried again")


def test_a_lost_replica_is_avoided_but_probed_until_it_answers() -> None:
    book = ReplicaBook([2])
    book.sent(0, 0)
    book.lost(0, 0, now=10.0)
    assert {book.choose(0, [0, 1], now=10.0) for _ in range(20)} == {1}
    assert book.probe(0, [0], now=10.1) is None
    assert book.probe(0, [0], now=10.0 + PROBE_EVERY_S) == 0
    assert book.probe(0, [0], now=10.0 + PROBE_EVERY_S) is None
    assert book.choose(0, [0], now=10.0) == 0
    answered(book, 0, 0.001, now=12.0)
    answered(book, 1, 0.9, now=12.0)
    assert book.choose(0, [0, 1], now=12.0) == 0


def test_a_copy_goes_neither_to_the_same_nor_to_a_busier_nor_to_a_lost_one() -> None:
    book = ReplicaBook([3])
    book.sent(0, 0)
    book.sent(0, 1)
    book.sent(0, 1)
    book.sent(0, 2)
    book.lost(0, 2, now=1.0)
    assert book.less_busy(0, 0, [0, 1, 2], now=1.0) is None
    book.abandoned(0, 1, 0.1, now=1.0)
    assert book.less_busy(0, 0, [0, 1, 2], now=1.0) == 1


def test_the_delay_is_what_most_answers_take() -> None:
    delay = HedgeDelay("p95")
    assert delay.seconds == float("inf")
    for n in range(SAMPLES):
        delay.record(1.0 if n % 100 >= 97 else 0.010 + n * 1e-6)
    assert 0.010 <= delay.seconds < 0.011
    assert HedgeDelay(0.25).seconds == 0.25
    for bad in (0, -1.0, "p99", None):
        with pytest.raises(ValueError, match="hedge_after"):
            HedgeDelay(bad)  # type: ignore[arg-type]
