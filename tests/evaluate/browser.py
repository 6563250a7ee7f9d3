"""A real browser without a window, driven over a pipe by its own protocol: how wide is a page, what does it load.

The page under test forbids scripts; what is evaluated here runs through the debugger and is not bound by that.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ABSENT = f"no browser: none of {', '.join(NAMES)} is on PATH"
WHOLE = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"


def browser_path() -> str | None:
    """Where a browser lies, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One tab."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies = commands, replies
        self._rest, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.loaded: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Load a file at a width, and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear()
        self.loaded.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        width, height = self.value(WHOLE)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """Print the page on paper."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            received = os.read(self._replies, 1 << 16)
            assert received, "the browser ended"
            self._rest += received
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message.get("method") == "Network.responseReceived":
            self.loaded.append(message["params"]["response"]["url"])
        return message


@contextmanager
def open_tab() -> Iterator[Tab]:
    """Start a browser with one tab, and end it."""
    path = browser_path()
    assert path is not None, ABSENT
    theirs_in, commands = os.pipe()
    replies, theirs_out = os.pipe()
    with TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        # The protocol is spoken on descriptors 3 and 4 of the browser.
        options = (
            "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            f"--disable-background-networking --hide-scrollbars --remote-debugging-pipe --user-data-dir={profile}"
        )
        script = f'exec "$0" {options} 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", script, path],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Tab(commands, replies)
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(replies)
