"""A headless Chromium for tests, spoken to over a pipe in its DevTools protocol; no driver, no library."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PATIENCE = 60.0  # seconds
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One open page."""

    def __init__(self, hear: IO[bytes], say: IO[bytes]) -> None:
        self._out, self._in = say, hear
        self._number, self._session, self._rest = 0, "", b""
        self.said: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """A command's result; what else was said meanwhile is kept."""
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            asked["sessionId"] = self._session
        self._out.write(json.dumps(asked).encode() + b"\0")
        self._out.flush()
        while (message := self._next()).get("id") != self._number:
            self.said.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def open(self, file: Path, width: int, height: int, **media: str) -> None:
        """Show a file in a window of a size; ``media`` such as prefers-color-scheme, with _ for -."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items() if name != "medium"]
        self.ask("Emulation.setEmulatedMedia", media=media.get("medium", ""), features=features)
        self.said.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(message.get("method") == "Page.loadEventFired" for message in self.said):
            self.said.append(self._next())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """Errors the page has caused since it was opened."""
        self.value("1")
        errors = [
            m["params"]["entry"]["text"]
            for m in self.said
            if m.get("method") == "Log.entryAdded" and m["params"]["entry"]["level"] == "error"
        ]
        return errors + [str(m["params"]) for m in self.said if m.get("method") == "Runtime.exceptionThrown"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser says nothing"
            more = os.read(self._in.fileno(), 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser with a profile of its own in ``folder``."""
    assert PROGRAM is not None
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()

    def wire() -> None:  # the browser reads at 3 and writes at 4
        kept = os.dup(from_write)
        os.dup2(to_read, 3)
        os.dup2(kept, 4)
        for number in (3, 4):  # a descriptor that stood there already is still closed on exec
            os.set_inheritable(number, True)

    words = [PROGRAM, *FLAGS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=wire, close_fds=False)
    os.close(to_read)
    os.close(from_write)
    with os.fdopen(to_write, "wb") as say, os.fdopen(from_read, "rb") as hear:
        try:
            yield Page(hear, say)
        finally:
            process.kill()
            process.wait()
