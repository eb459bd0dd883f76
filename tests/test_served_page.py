# SPDX-License-Identifier: Apache-2.0
"""The page at /, in a browser, against a running application."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.browser import Browser
    from tests.deployed import Deployed

PROMPT = "The cat sat"


class Page:
    """What a person does on the page."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def fill(self, name: str, value: str) -> None:
        """Write into a field, or choose, and leave it."""
        self.browser.run(
            f"(() => {{ const field = document.getElementById({json.dumps(name)});"
            f"field.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change'])"
            " field.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def text(self, name: str) -> str:
        return str(self.browser.run(f"document.getElementById('{name}').textContent"))

    def click(self, name: str) -> None:
        self.browser.run(f"document.getElementById('{name}').click()")

    def wait(self, state: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while (found := self.browser.run("document.body.dataset.state")) != state:
            assert time.monotonic() < until, (found, self.text("error"))
            time.sleep(0.05)

    def wait_for_text(self, name: str, part: str) -> None:
        until = time.monotonic() + 30
        while part not in self.text(name):
            assert time.monotonic() < until, self.text(name)
            time.sleep(0.05)


@pytest.fixture
def page(served: Deployed, browser: Browser) -> Iterator[Page]:
    browser.problems.clear()
    browser.visit(f"{served.url}/", served.url, 1280)
    yield Page(browser)
    browser.run("sessionStorage.clear()")


def unlock(page: Page, served: Deployed, key: str = "admin") -> None:
    page.wait("locked")
    page.fill("key", served.keys[key])
    page.wait("ready")


def test_two_tenants_answer_side_by_side(served: Deployed, page: Page, tmp_path: Path) -> None:
    unlock(page, served)
    chosen: Any = page.browser.run(
        "[...document.getElementById('left-model').options].map(option => option.value)"
    )
    assert {"full", "lora", "whole"} <= set(chosen)
    page.fill("left-model", "full")
    page.fill("right-model", "lora")
    page.fill("prompt", PROMPT)
    page.fill("max-tokens", "12")
    page.fill("temperature", "0")
    page.click("send")
    for side, model in (("left", "full"), ("right", "lora")):
        page.wait_for_text(f"{side}-status", "Finished")
        expected = served.complete(model, PROMPT, max_tokens=12)["choices"][0]["text"]
        assert page.text(f"{side}-text").endswith(expected)
        assert "12 tokens" in page.text(f"{side}-status")
    page.wait("ready")
    page.browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert page.browser.problems == []
    assert page.browser.run("location.search + location.hash") == ""


def test_a_chat_goes_on(served: Deployed, page: Page) -> None:
    unlock(page, served)
    page.fill("mode", "chat")
    page.fill("left-model", "full")
    page.fill("max-tokens", "5")
    for said in ("hi", "yo"):
        page.fill("prompt", said)
        page.click("send")
        page.wait_for_text("left-text", said)
        page.wait("ready")
    assert "hi" in page.text("left-text")
    assert page.browser.problems == []


def test_stop_frees_what_was_begun(served: Deployed, page: Page) -> None:
    unlock(page, served)
    page.fill("left-model", "full")
    page.fill("right-model", "")
    page.fill("prompt", "a")
    page.fill("max-tokens", "60")
    page.click("send")
    page.wait("streaming")
    page.click("stop")
    page.wait("ready")
    assert served.complete("full", PROMPT)["choices"][0]["text"]


def test_a_wrong_key_is_told_plainly(page: Page) -> None:
    page.wait("locked")
    page.fill("key", "sk-nonsense")
    page.wait_for_text("error", "valid key")
    assert page.browser.run("document.body.dataset.state") == "locked"


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone(served: Deployed, page: Page, width: int) -> None:
    page.browser.visit(f"{served.url}/", served.url, width)
    assert page.browser.run("document.documentElement.scrollWidth") <= width
    assert page.browser.run("document.title") == "offsite-ray"


def test_the_page_of_the_interface_works_offline(served: Deployed, browser: Browser) -> None:
    browser.problems.clear()
    browser.visit(f"{served.url}/docs", served.url, 1280)
    until = time.monotonic() + 30
    while "/v1/completions" not in str(browser.run("document.body.innerText")):
        assert time.monotonic() < until, browser.problems
        time.sleep(0.1)
    assert browser.problems == []
