"""Starting the processes that measure, one for every batch size and model, and reading the meter beside them."""

from __future__ import annotations

import contextlib
import dataclasses
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
from hesper.benchmark.record import Cell, Ending, Series
from hesper.benchmark.request import Request
from hesper.errors import HesperError, JobError, UsageError
from hesper.meters import Energy, Meter, Sampler, energy

__all__ = ["Progress", "cell"]

Progress = Callable[[str, int, int], None]
# Not by -m, which would look for torch and timm in the current folder first.
START = "import sys; sys.path = [place for place in sys.path if place]; from hesper.benchmark.child import main; main()"
COMMAND = (sys.executable, "-c", START)
CALM = 1.0  # seconds after loading and timing, before the machine counts as at rest
GRACE = 10.0  # seconds for a process that has told everything to end
LONGEST_REASON = 200


@dataclass
class _Story:
    """What a process told before it ended, and how it ended."""

    ending: Ending = "done"
    reason: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def last(self, event: str) -> dict[str, Any] | None:
        return next((each for each in reversed(self.events) if each["event"] == event), None)

    def every(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]


def cell(request: Request, meter: Meter | None, timeout: float, progress: Progress | None = None) -> Cell:
    """Measure one batch size: times in one process, memory in one process for each model.

    Whatever ends a process is a result; only a request that is wrong raises.

    Args:
        request: with the purpose "time".
        meter: one that can be read, or None for no energy.
        timeout: seconds after which the batch size is given up; what was measured by then counts.
        progress: told (stage, done, total).

    Raises:
        UsageError: the process refused the request: no such model, wrong weights, no images.
        JobError: likewise, where the request is not at fault.
    """
    deadline, power = time.monotonic() + timeout, _Power()
    asked = request if meter is not None else dataclasses.replace(request, stretches=0)
    metered = None if meter is None else lambda go, until, story: _metered(meter, request.stretch_seconds, go, until, story, power)
    story = _run(asked, deadline, progress, metered)
    times, settled = story.last("times"), story.last("settled") or {"rounds": 0, "settled": False}
    if times is None:
        if story.ending == "done":
            story.ending, story.reason = "crashed", "the process ended without a result"
        return Cell(request.batch_size, story.ending, _in_time(story, timeout), settled["rounds"], settled["settled"], {})
    runtimes = (story.last("opened") or {}).get("runtimes", {})
    series, interrupted = {}, story.ending == "interrupted"
    for name, subject in request.subjects.items():
        one = dataclasses.replace(request, subjects={name: subject}, purpose="memory", stretches=0)
        peak, why = ({"host": None, "device": None}, "interrupted") if interrupted else _memory(one, deadline, timeout, progress)
        interrupted = interrupted or why == "interrupted"
        stretches = power.energies.get(name, [])
        found, counts = tuple(each for each, _ in stretches), tuple(count for _, count in stretches)
        series[name] = Series(
            tuple(times["seconds"][name]), times["macs"][name], peak["host"], peak["device"], found, counts, why, runtimes.get(name)
        )
    if interrupted:
        story.ending, story.reason = "interrupted", "the bench was interrupted"
    if story.ending == "out of memory":  # the times are there, so the batch did fit
        story.ending, story.reason = "crashed", f"while energy was measured: {story.reason}"
    reason, watts = _in_time(story, timeout), power.idle
    return Cell(
        request.batch_size, story.ending, reason, settled["rounds"], settled["settled"], series, times["threads"], watts, power.no_idle
    )


def _memory(request: Request, deadline: float, timeout: float, progress: Progress | None) -> tuple[dict[str, Any], str | None]:
    """Peaks of memory, or none and why; the times are there already, and nothing that goes wrong here may lose them."""
    none = {"host": None, "device": None}
    try:
        looked = _run(request, deadline, progress)
    except HesperError as error:
        return none, str(error)
    except KeyboardInterrupt:
        return none, "interrupted"
    peak = looked.last("memory")
    return (none, f"{looked.ending}: {_in_time(looked, timeout) or 'no result'}") if peak is None else (peak, None)


@dataclass
class _Power:
    """Energy of every stretch and its images by model, and what the machine drew at rest before."""

    energies: dict[str, list[tuple[Energy, int]]] = field(default_factory=dict)
    idle: float | None = None
    no_idle: str | None = None


Metered = Callable[[Callable[[], None], Callable[[], None], _Story], None]


def _in_time(story: _Story, timeout: float) -> str | None:
    return f"it took longer than {timeout:g} s" if story.ending == "timed out" and story.reason is None else story.reason


def _metered(meter: Meter, seconds: float, go: Callable[[], None], until_done: Callable[[], None], story: _Story, power: _Power) -> None:
    """Read the meter while the process rests, then while it runs stretch after stretch; those that ended count, whatever comes after."""
    with Sampler(meter) as sampler:
        time.sleep(CALM)
        start = time.monotonic()
        time.sleep(seconds)
        rest = time.monotonic()
        try:
            go()
            until_done()
        finally:
            time.sleep(2 * meter.period)  # a reading after the last stretch
            idle = energy(sampler.trace, start, rest)
            power.idle, power.no_idle = idle.watts, idle.reason
            for each in story.every("stretch"):
                own = energy(sampler.trace, each["start"], each["end"], idle.watts)
                power.energies.setdefault(each["subject"], []).append((own, int(each["images"])))


def _run(
    request: Request,
    deadline: float,
    progress: Progress | None,
    metered: Metered | None = None,
) -> _Story:
    """Run one process to its end, or to ``deadline`` on the monotonic clock."""
    story = _Story()
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
                _show(event, request, progress)
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


def _show(event: dict[str, Any], request: Request, progress: Progress | None) -> None:
    if progress is None:
        return
    if event["event"] == "round":
        progress(f"Time batches of {request.batch_size}", event["count"], request.rounds)
    stages = {"opened": f"Warm up, batches of {request.batch_size}", "ready": "Measure energy", "memory": "Measure memory"}
    if event["event"] in stages:
        progress(stages[event["event"]], 0, 0)


def _judge(story: _Story, code: int, complaints: str) -> None:
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
