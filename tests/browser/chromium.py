"""Headless Chromium, driven over a pipe with its own DevTools protocol: nothing to install but the browser.

    python tests/browser/chromium.py PAGE.html IMAGE.png WIDTH HEIGHT light|dark [SELECTOR]

takes a picture of a page, from its top or from the first element that SELECTOR names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Chromium:
    """One tab; use it as a context manager.

    `messages` are what pages said on the console since the last `open`, errors of the browser included.
    """

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        high = [os.dup(fd) for fd in (theirs_in, theirs_out)]  # the browser reads from 3 and writes to 4
        command = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", str(EXECUTABLE), *_FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._buffer, self._count, self.messages = b"", 0, []
        self._session: str | None = None
        self._loaded = False
        pages = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        target = pages[0]["targetId"] if pages else self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)
        self.profile.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            block = os.read(self._in, 1 << 20)
            assert block, "Chromium has gone"
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Log.entryAdded":
            self.messages.append(f"{params['entry']['level']}: {params['entry']['text']}")
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"{params['type']}: {[arg.get('value') for arg in params['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {params['exceptionDetails']['text']}")
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {params['message']}")
        return answer

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> float:
        """Load a file at that size; returns the seconds until its load event."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.messages, self._loaded = [], False
        started = time.perf_counter()
        self.send("Page.navigate", url=Path(page).absolute().as_uri())
        while not self._loaded:
            self._receive()
        return time.perf_counter() - started

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; its Content-Security-Policy does not bind this."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, file: Path, top: int = 0, height: int | None = None) -> None:
        """A PNG of the page from `top` on, of its whole length without `height`."""
        width = self.ask("innerWidth")
        tall = height or self.ask("document.documentElement.scrollHeight") - top
        clip = {"x": 0, "y": top, "width": width, "height": tall, "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        Path(file).write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    page, image, width, height, scheme, *start = sys.argv[1:]
    with Chromium() as browser:
        browser.open(Path(page), int(width), int(height), dark=scheme == "dark")
        place = f"document.querySelector({json.dumps(start[0])}).getBoundingClientRect().top" if start else "0"
        browser.picture(Path(image), max(0, int(browser.ask(place)) - 16), int(height))
