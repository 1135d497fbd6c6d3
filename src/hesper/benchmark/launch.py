"""Starting a process that measures, listening to it, and telling from its last words how it ended."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from hesper.benchmark.child import GO
from hesper.benchmark.record import Ending
from hesper.benchmark.request import Request
from hesper.errors import JobError, UsageError

__all__ = ["Hear", "Metered", "Story", "run"]

# Not by -m, which would look for torch and timm in the current folder first.
START = "import sys; sys.path = [place for place in sys.path if place]; from hesper.benchmark.child import main; main()"
COMMAND = (sys.executable, "-c", START)
GRACE = 10.0  # seconds for a process that has told everything to end
LONGEST_REASON = 200


@dataclass
class Story:
    """What a process told before it ended, and how it ended."""

    ending: Ending = "done"
    reason: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def last(self, event: str) -> dict[str, Any] | None:
        """The last event of that name, None where it was never told."""
        return next((each for each in reversed(self.events) if each["event"] == event), None)

    def every(self, event: str) -> list[dict[str, Any]]:
        """All events of that name, in order."""
        return [each for each in self.events if each["event"] == event]


Hear = Callable[[dict[str, Any]], None]
Metered = Callable[[Callable[[], None], Callable[[], None], Story], None]


def run(request: Request, deadline: float, hear: Hear | None = None, metered: Metered | None = None) -> Story:
    """Run one process to its end, or to ``deadline`` on the monotonic clock.

    Args:
        request: what it does.
        deadline: seconds of the monotonic clock.
        hear: told every event.
        metered: called once the process is at rest with everything loaded, with what lets it go on, what waits for its end, and its story.

    Raises:
        UsageError: the process refused the request.
        JobError: likewise, where the request is not at fault.
    """
    story = Story()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints, _process(complaints) as process:
        assert process.stdin is not None
        tell = process.stdin

        def say(text: str) -> None:
            with contextlib.suppress(BrokenPipeError):
                tell.write(text + "\n")
                tell.flush()

        lines = _lines(process, deadline)
        say(request.dumps())
        try:
            for event in lines:
                story.events.append(event)
                if hear is not None:
                    hear(event)
                if event["event"] == "ready" and metered is not None:
                    metered(lambda: say(GO), lambda: story.events.extend(lines), story)
        except KeyboardInterrupt:
            if story.last("times") is None:
                raise
            process.kill()
            process.wait()
            story.ending = "interrupted"
            return story
        except TimeoutError:
            process.kill()
            process.wait()
            story.ending = "timed out"
            return story
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = 0 if story.last("done") else process.wait()
            if code:
                story.ending, story.reason = "timed out", "it told nothing more and did not end"
                return story
        complaints.seek(0)
        _judge(story, code, complaints.read())
    return story


@contextlib.contextmanager
def _process(complaints: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _lines(process: subprocess.Popen[str], deadline: float) -> Iterator[dict[str, Any]]:
    """The events of a process; TimeoutError where none comes before ``deadline``."""
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def pump() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in process.stdout:
                told.put(line)
        told.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = told.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        with contextlib.suppress(ValueError):  # what else prints, or a line that broke off
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                yield event


def _judge(story: Story, code: int, complaints: str) -> None:
    """How a process ended, from its last words."""
    refused, starved = story.last("refused"), story.last("out of memory")
    if refused is not None:
        raise (UsageError if refused["exit_code"] == UsageError.exit_code else JobError)(refused["sentence"])
    if starved is not None:
        story.ending, story.reason = "out of memory", starved["sentence"]
    elif code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        story.ending, story.reason = "out of memory", "the system ended it, as it does where memory runs out"
    elif told := story.last("crashed"):
        story.ending, story.reason = "crashed", told["sentence"][:LONGEST_REASON]
    elif code != 0:
        last = next((line for line in reversed(complaints.splitlines()) if line.strip()), f"exit code {code}")
        how = f"signal {-code}" if code < 0 else last.strip()[:LONGEST_REASON]
        story.ending, story.reason = "crashed", how
