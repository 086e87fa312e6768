"""How the thread that trains and the one that answers the driver talk."""

from __future__ import annotations

import threading

from trainer.control import Control


def test_a_wish_to_stop_stays() -> None:
    control = Control()
    assert not control.stop_requested()
    control.request_stop()
    control.request_stop()
    assert control.stop_requested()


def test_the_newest_numbers_stay_and_each_message_is_told_once() -> None:
    control = Control()
    assert control.poll() == ({}, [], 0)
    control.report({"step": 1, "loss": 3.0})
    control.say("one")
    control.say("two")
    control.report({"step": 2})
    assert control.poll() == ({"step": 2, "loss": 3.0}, ["one", "two"], 2)
    assert control.poll() == ({"step": 2, "loss": 3.0}, [], 2)


def test_what_is_polled_does_not_change_afterwards() -> None:
    control = Control()
    control.report({"step": 1})
    numbers, messages, _ = control.poll()
    numbers["step"] = 99
    messages.append("mine")
    control.report({"loss": 2.0})
    assert control.poll()[:2] == ({"step": 1, "loss": 2.0}, [])


def test_no_message_is_lost_between_threads() -> None:
    control = Control()
    speakers = [
        threading.Thread(target=lambda n=n: [control.say(f"{n}-{i}") for i in range(500)])
        for n in range(4)
    ]
    heard: list[str] = []
    for speaker in speakers:
        speaker.start()
    while any(speaker.is_alive() for speaker in speakers):
        heard += control.poll()[1]
    heard += control.poll()[1]
    for n in range(4):
        assert [m for m in heard if m.startswith(f"{n}-")] == [f"{n}-{i}" for i in range(500)]


def test_work_without_numbers_shows_too() -> None:
    control = Control()
    control.beat()
    assert control.poll().pulse == 1
    assert control.poll().pulse == 1
