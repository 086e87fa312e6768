"""A headless Chromium for tests of pages; skips where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,1400",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()


def texts(browser: Any, selector: str) -> list[str]:
    """What the elements show."""
    return [found.text for found in browser.find_elements("css selector", selector)]


def until(shown: Callable[[], bool]) -> None:
    """Wait until the page shows it; elements may be replaced meanwhile."""
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if shown():
                return
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    raise AssertionError("the page does not show it")
