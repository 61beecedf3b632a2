"""A page in headless Chromium, without a network.

    page = open_page(tmp_path / "report.html")
    assert not page.errors and not page.requests and all(image.loaded for image in page.images)

It speaks Chromium's DevTools protocol over two pipes, so that no driver and no port are needed.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DEAD_PROXY = "http://127.0.0.1:9"  # the discard port: nothing answers there
_IMAGES = """(async () => {
  document.querySelectorAll('details').forEach(each => { each.open = true; });
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => {})));
  return images.map(image => ({alt: image.alt, width: image.naturalWidth,
    height: image.naturalHeight, shown: image.getBoundingClientRect().width}));
})()"""


@dataclass(frozen=True)
class PageImage:
    """An <img>: its alternative text, its own size and its width on the page, in pixels."""

    alt: str
    width: int
    height: int
    shown: float

    @property
    def loaded(self) -> bool:
        return self.width > 0


@dataclass
class Page:
    """What a page did while it was loaded.

    Attributes:
        title: of the document.
        text: as a reader sees it.
        console: "level: text" of every message, exceptions included.
        errors: those of level error.
        images: every <img>.
        requests: addresses that it asked for, other than files and data.
    """

    title: str = ""
    text: str = ""
    console: list[str] = field(default_factory=list)
    images: list[PageImage] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [message for message in self.console if message.startswith("error: ")]


def open_page(path: str | os.PathLike, width: int = 1200, timeout: float = 60) -> Page:
    """Open a file. Skips the test where there is no Chromium; with REQUIRE_CHROMIUM=1 it fails."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        message = "no Chromium: apt-get install chromium"
        if os.environ.get("REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"REQUIRE_CHROMIUM=1, but {message}")
        pytest.skip(message)
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        browser = _Browser(program, profile, width, time.monotonic() + timeout)
        try:
            return browser.load(Path(path).resolve().as_uri())
        finally:
            browser.close()


class _Browser:
    def __init__(self, program: str, profile: str, width: int, deadline: float):
        from_here, self._commands = os.pipe()
        self._answers, to_here = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        shell = f'exec "$@" 3<&{from_here} 4>&{to_here}'
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
            *(f"--proxy-server={_DEAD_PROXY}", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--disable-background-networking", f"--window-size={width},1600"),
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *flags],
            pass_fds=(from_here, to_here),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(from_here)
        os.close(to_here)
        self._deadline = deadline
        self._numbers = itertools.count(1)
        self._received = b""
        self._events: list[dict[str, Any]] = []

    def load(self, address: str) -> Page:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._call(f"{domain}.enable", session)
        failure = self._call("Page.navigate", session, url=address).get("errorText")
        assert not failure, f"{address}: {failure}"
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        images = self._evaluate(session, _IMAGES)
        page = Page(
            title=self._evaluate(session, "document.title"),
            text=self._evaluate(session, "document.body.innerText"),
            images=[PageImage(**image) for image in images],
        )
        for event in self._events:
            page.console += _messages(event)
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "about:")):
                    page.requests.append(url)
        return page

    def close(self) -> None:
        """End the browser with all its processes, which are a group of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def _evaluate(self, session: str, expression: str) -> Any:
        answer = self._call(
            "Runtime.evaluate",
            session,
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; messages end with a zero byte."""
        while b"\0" not in self._received:
            left = self._deadline - time.monotonic()
            ready = select.select([self._answers], [], [], max(0, left))[0]
            assert ready, "Chromium did not answer in time"
            block = os.read(self._answers, 1 << 16)
            assert block, f"Chromium ended, exit code {self._process.wait()}"
            self._received += block
        message, _, self._received = self._received.partition(b"\0")
        return {"method": "", **json.loads(message)}


def _messages(event: dict[str, Any]) -> Iterator[str]:
    params = event.get("params", {})
    if event["method"] == "Runtime.consoleAPICalled":
        words = (str(part.get("value", part.get("description"))) for part in params["args"])
        yield f"{params['type']}: {' '.join(words)}"
    elif event["method"] == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        words = details.get("exception", {}).get("description", details["text"])
        yield f"error: {words}"
    elif event["method"] == "Log.entryAdded":
        yield f"{params['entry']['level']}: {params['entry']['text']}"
