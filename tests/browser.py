"""Chromium without a head, for tests of pages: the system's own, driven by Playwright.

Where it is missing tests are skipped, and in CI they fail.

with browser() as chromium: page = chromium.new_page(...)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
Browser, Page = sync_api.Browser, sync_api.Page
expect = sync_api.expect  # it waits for what a click brings; `assert each.is_visible()` reads at once
expect.set_options(timeout=15_000)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def browser() -> Iterator[Browser]:
    """One browser; where the machine has none, skips the test, or fails it in CI."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs chromium or google-chrome on PATH")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, headless=True, args=list(ARGUMENTS))
        try:
            yield chromium
        finally:
            chromium.close()
