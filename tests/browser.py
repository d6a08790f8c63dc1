"""Chromium without a window, for pages from files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --window-size=1400,1050"
)
SECONDS = 60


@contextmanager
def opened(page: Path, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser that shows `page` and has run its scripts; its profile is empty, and goes again."""
    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium")
    profile = tempfile.mkdtemp()
    for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_program("chromedriver")))
    try:
        if dark:
            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get("about:blank")
        driver.get_log("performance")  # What the page of a new tab asks for is not ours.
        driver.get(page.as_uri())
        WebDriverWait(driver, SECONDS).until(
            lambda one: one.execute_script("return document.documentElement.dataset.ready")
        )
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def requests(driver: webdriver.Chrome) -> list[str]:
    """The addresses that the browser has asked for since the last look."""
    messages: list[Mapping[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"there is no {name}; Debian: apt install chromium chromium-driver"
    return found
