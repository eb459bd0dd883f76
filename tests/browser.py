# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven through a pipe by its DevTools protocol; nothing else is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page in one browser, which is ended with the block."""

    def __init__(self, profile: Path) -> None:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # the browser reads commands from its descriptor 3 and answers on 4
        words = [found, "--headless=new", "--no-sandbox", "--disable-gpu",
                 "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run",
                 "--hide-scrollbars",
                 f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        shell = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._count, self._loaded = b"", 0, False
        self._allowed: dict[str, str] = {}
        self.problems: list[str] = []
        """Errors of scripts, and whatever the page asked the network for."""
        self._session: str | None = None
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Show a page, in a window of so many pixels, and wait until it is drawn."""
        self.visit(page.as_uri(), "file:", width, height, dark=dark)
        assert self.run("document.documentElement.dataset.drawn") == "yes", self.problems

    def visit(
        self, url: str, allowed: str, width: int, height: int = 900, *, dark: bool = False
    ) -> None:
        """Show what is at an address; it may ask for nothing that does not begin as is allowed."""
        self._allowed[url] = allowed
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=url)
        while not self._loaded:
            self._look(self._next())

    def run(self, script: str) -> Any:
        """Return what a script gives; what it promises is waited for."""
        found = self._ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of the first element of a selector."""
        x, y = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const r = node.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        asked: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._count:
                assert "error" not in said, said
                return said["result"]
            self._look(said)

    def _look(self, said: dict[str, Any]) -> None:
        parameters = said.get("params", {})
        if said["method"] == "Page.loadEventFired":
            self._loaded = True
        elif said["method"] == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(str(details.get("exception", details)))
        elif said["method"] == "Network.requestWillBeSent":
            # an icon is asked for when the page is drawn, perhaps after the next one is asked for
            url, page = parameters["request"]["url"], parameters["documentURL"]
            if not url.startswith((self._allowed.get(page, "data:"), "data:")):
                self.problems.append(url)
        elif said["method"] == "Log.entryAdded":
            self.problems.append(parameters["entry"]["text"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._read, 2**20)
            assert more, "the browser has ended"
            self._buffer += more
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message
