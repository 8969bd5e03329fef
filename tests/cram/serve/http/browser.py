"""A headless Chromium, driven by the WebDriver protocol over plain HTTP."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """Which program is not installed, or None."""
    return next((name for name in ("chromedriver", "chromium") if shutil.which(name) is None), None)


class Browser:
    """One window.

    Args:
        base: Address of the session.
    """

    def __init__(self, base: str) -> None:
        self._base = base

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One command of the protocol; the value that it returns."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:500]) from None

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Show a page in a viewport of this size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        self.call("/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.call("/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The first true value that a script returns in the page."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"the page must come to {script!r}"
            time.sleep(0.05)
        return found

    def element(self, selector: str) -> str:
        """The id of an element."""
        return self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        """Click an element, which must be in sight and not covered."""
        self.call(f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element; into a file input, a path."""
        self.call(f"/element/{self.element(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """The text that an element shows."""
        return self.call(f"/element/{self.element(selector)}/text")

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        params = {"captureBeyondViewport": True, "format": "png"}
        found = self.call("/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": params})
        file.write_bytes(base64.b64decode(found["data"]))

    def errors(self) -> list[str]:
        """What the page has complained about on the console."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        quiet = subprocess.DEVNULL
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=quiet, stderr=quiet)
        try:
            base = f"http://127.0.0.1:{port}"
            _await(lambda: urllib.request.urlopen(f"{base}/status", timeout=5).close())
            options = {
                "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={profile}"]},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = Browser(base).call("/session", {"capabilities": {"alwaysMatch": options}})
            browser = Browser(f"{base}/session/{session['sessionId']}")
            yield browser
            browser.call("/window/rect")
            request = urllib.request.Request(f"{base}/session/{session['sessionId']}", method="DELETE")
            urllib.request.urlopen(request, timeout=30).close()
        finally:
            driver.terminate()
            driver.wait(20)


def _await(function: Callable[[], None]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return function()
        except OSError:
            assert time.monotonic() < deadline, "the driver must answer within 30 s"
            time.sleep(0.05)
