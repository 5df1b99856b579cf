"""Look at a page in headless Chromium, through its pipe for remote control; no package is needed."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60  # seconds that an answer may take
# The two file descriptors at which the browser expects the pipe.
_READS, _WRITES = 3, 4


class Browser:
    """Browser shows one page; `troubles` are the errors of its console and its network."""

    def __init__(self, reads: int, writes: int):
        self._from, self._to = os.fdopen(reads, "rb", buffering=0), os.fdopen(writes, "wb", buffering=0)
        self._rest, self._asked, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []
        self.troubles: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; keep the events that the page sends meanwhile."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._asked:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._from.read(2**20)
            assert more, "the browser ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._hear(message)
        return message

    def _hear(self, message: dict[str, Any]) -> None:
        method, told = message.get("method"), message.get("params", {})
        self._events.append({"method": method})
        if method == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(told["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" or method == "Runtime.consoleAPICalled":
            self.troubles.append(json.dumps(told)[:500])
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(
            ("file:", "about:")
        ):
            self.troubles.append(f"asked for {told['request']['url']}")

    def open(
        self, page: Path, width: int = 1200, height: int = 900, dark: bool = False, phone: bool = False
    ) -> None:
        """Open a file in a window of this size."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.ask("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._next()

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the mouse to this point."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save a screenshot as PNG."""
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """Start Chromium without any network, with its profile in `home`, and end it."""
    commands, answers = os.pipe(), os.pipe()

    def arrange() -> None:  # in the child, between fork and exec
        os.dup2(os.dup(commands[0]), 10)
        os.dup2(os.dup(answers[1]), 11)
        os.dup2(10, _READS)
        os.dup2(11, _WRITES)

    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", f"--user-data-dir={home}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [CHROMIUM, *flags],
        preexec_fn=arrange,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    watchdog = threading.Timer(TIMEOUT, process.kill)  # else reading from a silent pipe would wait for ever
    watchdog.start()
    try:
        yield Browser(answers[0], commands[1])
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for end in (commands[1], answers[0]):
            with contextlib.suppress(OSError):
                os.close(end)
