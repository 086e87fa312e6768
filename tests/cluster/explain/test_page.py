"""The explanation's page: safe whatever an entry says, and alive in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.explain.explanation import (
    EntryRead,
    EntryText,
    Explanation,
    Guess,
    LayerReading,
    Prediction,
    Without,
)
from cluster.explain.page import render, write_page
from tests.cluster.explain.browser import chromium, texts

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='o'\">"
FIRST, SECOND = 4068310670515372041, 4068310670515372042  # one number, as a browser counts


def predicted(token: str, probability: float, asked: float) -> tuple[Prediction, ...]:
    guesses = (Guess(token=token, probability=probability), Guess(token="no", probability=0.1))
    return (
        Prediction(position=2, guesses=guesses, asked=Guess(token="lisbon", probability=asked)),
    )


EXPLANATION = Explanation(
    text="capital is [MASK]",
    model="model",
    memory="memory",
    tokens=("[CLS]", "capital", "[MASK]", "##s", "[SEP]"),
    k=2,
    predictions=predicted("lisbon", 0.8, 0.8),
    layers=(
        LayerReading(
            layer=3,
            entries=(
                EntryRead(id=FIRST, score=2.0, attention=((0.1, 0.2, 0.9, 0.4, 0.5),) * 2),
                EntryRead(id=SECOND, score=1.0, attention=((0.9, 0.8, 0.1, 0.6, 0.5),) * 2),
            ),
        ),
    ),
    entries=(
        EntryText(id=FIRST, doc_id=1, domain="d", title=NASTY, source="s", text="Lisbon."),
        EntryText(id=SECOND, doc_id=2, domain="d", title="Porto", source="s", text=NASTY),
    ),
    without=(
        Without(id=FIRST, predictions=predicted("porto", 0.5, 0.25)),
        Without(id=SECOND, predictions=predicted("lisbon", 0.9, 0.9)),
        Without(id=None, predictions=predicted("madrid", 0.4, 0.05)),
    ),
)


def test_no_text_becomes_markup() -> None:
    page = render(replace(EXPLANATION, text=NASTY, model=NASTY))
    assert NASTY not in page
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "default-src 'none'" in page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    write_page(EXPLANATION, tmp_path / "why.html")
    browser.get((tmp_path / "why.html").as_uri())
    yield browser
    assert browser.get_log("browser") == [], "no error, and nothing refused"
    assert browser.title == "Why? · capital is [MASK]"


def share(browser: Any, selector: str, number: int) -> float:
    found = browser.find_elements("css selector", selector)[number]
    script = "return arguments[0].style.getPropertyValue('--share')"
    return float(browser.execute_script(script, found))


def point_at(browser: Any, selector: str, number: int) -> None:
    from selenium.webdriver import ActionChains

    element = browser.find_elements("css selector", selector)[number]
    ActionChains(browser).move_to_element(element).perform()


def test_it_shows_the_answer_and_every_entry_as_text(page: Any) -> None:
    assert texts(page, ".token") == ["[CLS]", "capital", "lisbon", "s", "[SEP]"]
    assert texts(page, ".guess.first > span:first-child") == ["lisbon"]
    assert texts(page, ".entry h3") == [f"1. {NASTY}", "2. Porto"]
    assert texts(page, ".entry .words")[1] == NASTY
    assert "read 90.0 % at the [MASK]" in texts(page, ".entry")[0]


def test_pointing_at_a_word_shows_what_it_read(page: Any) -> None:
    point_at(page, ".token", 1)
    assert "read 20.0 % by the word pointed at" in texts(page, ".entry")[0]
    assert share(page, ".entry .fill", 1) == 0.8


def test_pointing_at_an_entry_shows_who_read_it(page: Any) -> None:
    point_at(page, ".entry", 1)
    assert [share(page, ".token", i) for i in range(5)] == [0.9, 0.8, 0.1, 0.6, 0.5]


def test_an_entry_that_is_switched_off_changes_the_answer(page: Any) -> None:
    switches = page.find_elements("css selector", ".entry .switch")
    switches[0].click()
    assert texts(page, ".token")[2] == "porto"
    assert texts(page, ".delta") == ["lisbon: 80.0 % → 25.0 % (\u221255.0 points)"]
    assert texts(page, ".entry .switch") == ["switched off", "switch off"]
    switches[1].click()  # one at a time: that is what was measured
    assert texts(page, ".entry .switch") == ["switch off", "switched off"]
    assert texts(page, ".delta") == ["lisbon: 80.0 % → 90.0 % (+10.0 points)"]
    page.find_element("id", "whole").click()
    assert texts(page, ".token")[2] == "madrid"
    page.find_element("id", "whole").click()
    assert texts(page, ".token")[2] == "lisbon"


def test_a_text_from_right_to_left_is_shown_so(browser: Any, tmp_path: Path) -> None:
    tokens = ("[CLS]", "القاهرة", "[MASK]", "عاصمة", "[SEP]")
    write_page(replace(EXPLANATION, tokens=tokens), tmp_path / "rtl.html")
    browser.get((tmp_path / "rtl.html").as_uri())
    script = "return getComputedStyle(document.getElementById('text')).direction"
    assert browser.execute_script(script) == "rtl"
    words = browser.find_elements("css selector", ".token")
    assert words[1].location["x"] > words[3].location["x"]
