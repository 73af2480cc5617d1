"""A real browser that opens pages from disk: Chromium without a window, spoken to through a pipe.

Chromium's DevTools protocol over two file descriptors: no port, no driver, no network.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--force-color-profile=srgb", "--remote-debugging-pipe"),
)
SECONDS = 180.0  # for any one answer: the machine may be busy


def chromium() -> str | None:
    """Return where Chromium is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One Chromium with one page.

    Attributes:
        console: what pages wrote to the console, and exceptions.
        requests: addresses that pages asked for.
    """

    def __init__(self) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._folder = tempfile.mkdtemp(prefix="hvdloss-browser-")
        there, self._write = os.pipe()
        self._read, back = os.pipe()

        def ends() -> None:
            # dup2 onto itself would leave a descriptor that closes when Chromium starts.
            a, b = os.dup(there), os.dup(back)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self._child = subprocess.Popen(
            [str(chromium()), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            preexec_fn=ends,
            close_fds=False,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._number, self._rest, self._session = 0, b"", ""
        self._answers: dict[int, dict[str, Any]] = {}
        self._loaded = False
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something; return what it says."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while number not in self._answers:
            self._hear(end)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _hear(self, end: float) -> None:
        ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"Chromium said nothing for {SECONDS:g} s")
        data = os.read(self._read, 1 << 20)
        if not data:
            raise RuntimeError(f"Chromium ended with status {self._child.poll()}")
        *messages, self._rest = (self._rest + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
                continue
            of = message["params"]
            match message["method"]:
                case "Network.requestWillBeSent":
                    self.requests.append(of["request"]["url"])
                case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                    self.console.append(json.dumps(of)[:1000])
                case "Log.entryAdded":
                    self.console.append(of["entry"]["text"])
                case "Page.loadEventFired":
                    self._loaded = True

    def open(self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Open a file in a window of this size, with the system's colours light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        told = self.call("Page.navigate", url=path.resolve().as_uri())
        if told.get("errorText"):
            raise RuntimeError(told["errorText"])
        end = time.monotonic() + SECONDS
        while not self._loaded:
            self._hear(end)

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(json.dumps(told["exceptionDetails"])[:2000])
        return told["result"].get("value")

    def picture(self, path: Path, selector: str = "html") -> None:
        """Write a screenshot of an element."""
        box = self.ask(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height} })()"
        )
        told = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip={**box, "scale": 1}
        )
        path.write_bytes(base64.b64decode(told["data"]))

    def close(self) -> None:
        """End the browser, and all that it started."""
        with contextlib.suppress(Exception):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
