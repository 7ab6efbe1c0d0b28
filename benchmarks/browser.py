"""A headless Chromium that pages are looked at in: by tests of the report and by `benchmarks.screenshots`."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
)
KEYS = {
    "Tab": 9,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


class Browser:
    """One page of a headless Chromium, driven over its debugging pipe (descriptors 3 and 4, JSON ended by NUL)."""

    def __init__(self, profile: Path):
        if CHROMIUM is None:
            raise RuntimeError("no chromium on this machine; install one (apt-get install chromium)")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self._session: str | None = None
        self.problems: list[Any] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.size(1280, 900)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the protocol; returns its result, and takes in what the page did meanwhile."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        happened = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(happened["exceptionDetails"])
            case "Runtime.consoleAPICalled" if happened["type"] in ("error", "warning", "assert"):
                self.problems.append(happened["args"])
            case "Log.entryAdded" if happened["entry"]["level"] in ("error", "warning"):
                self.problems.append(happened["entry"])
            case "Network.requestWillBeSent":
                self.requests.append(happened["request"]["url"])
        return message

    def size(self, width: int, height: int, mobile: bool = False, scale: float | None = None) -> None:
        """Of the page, in CSS pixels; `scale` of the device, by default 2 of a phone and else 1."""
        scale = scale or (2 if mobile else 1)
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def open(self, url: str, shown: str = "performance.getEntriesByName('opd rollouts shown').length > 0") -> None:
        """Go to a page and wait until it is complete and `shown`."""
        self.ask("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && {shown}")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 30) -> None:
        """Wait for a JavaScript expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def point_at(self, expression: str) -> None:
        """Move the mouse to the middle of the element that a JavaScript expression gives."""
        self.run(f"{expression}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{expression}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def panel(self) -> str:
        """What the report says of the token under the pointer or the focus."""
        return str(self.run("document.querySelector('.panel').innerText"))

    def colours(self, dark: bool) -> None:
        """What the system is said to prefer."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, box: dict[str, float] | None = None) -> bytes:
        """A PNG of what is in sight, or of a part of the page: `x`, `y`, `width` and `height` in CSS pixels."""
        clip = {} if box is None else {"clip": {**box, "scale": 1}, "captureBeyondViewport": True}
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", **clip)["data"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)
