"""One batch size: several processes that take times, the meter beside them, and a process for each model's memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hesper.benchmark.launch import Hear, Metered, Story, run
from hesper.benchmark.record import Cell, Ending, Series
from hesper.benchmark.request import Request
from hesper.errors import HesperError
from hesper.meters import Energy, Meter, Sampler, energy

__all__ = ["Progress", "cell"]

Progress = Callable[[str, int, int], None]
CALM = 1.0  # seconds after loading and timing, before the machine counts as at rest
STRETCHES = 3  # for energy, of all processes together; at least one in each


@dataclass
class _Power:
    """Energy of every stretch and its images by model, and what the machine drew at rest before, process by process."""

    energies: dict[str, list[tuple[Energy, int]]] = field(default_factory=dict)
    idle: list[float] = field(default_factory=list)
    no_idle: str | None = None


@dataclass
class _Taken:
    """What the processes that took times told, those that did, and how the last one ended."""

    stories: list[Story] = field(default_factory=list)
    ending: Ending = "done"
    reason: str | None = None
    power: _Power = field(default_factory=_Power)


def cell(request: Request, processes: int, memory: bool, meter: Meter | None, timeout: float, progress: Progress | None = None) -> Cell:
    """Measure one batch size: times in several processes one after the other, memory in one process for each model.

    Whatever ends a process is a result; only a request that is wrong raises.

    Args:
        request: with the purpose "time"; how many stretches each process makes is found here.
        processes: that take times; each is one sample of how fast the models are.
        memory: whether to look at the peak of memory too.
        meter: one that can be read, or None for no energy.
        timeout: seconds after which the batch size is given up; what was measured by then counts.
        progress: told (stage, done, total).

    Raises:
        UsageError: the first process refused the request: no such model, wrong weights, no images.
        JobError: likewise, where the request is not at fault.
    """
    deadline = time.monotonic() + timeout
    taken = _take(request, processes, meter, deadline, timeout, progress)
    told = [story.last("settled") or {"rounds": 0, "settled": False} for story in taken.stories]
    warmup, settled = max((each["rounds"] for each in told), default=0), all(each["settled"] for each in told)
    times = [found for story in taken.stories if (found := story.last("times")) is not None]
    if not times:
        return Cell(request.batch_size, taken.ending, taken.reason, warmup, settled and bool(told), {})
    runtimes = (taken.stories[0].last("opened") or {}).get("runtimes", {})
    series, ending, reason = {}, taken.ending, taken.reason
    for name, subject in request.subjects.items():
        one = dataclasses.replace(request, subjects={name: subject}, purpose="memory", stretches=0)
        skip = "interrupted" if ending == "interrupted" else None if memory else "it was not asked for"
        peak, why = (_NO_PEAK, skip) if skip else _memory(one, deadline, timeout, progress)
        if why == "interrupted":
            ending, reason = "interrupted", "the bench was interrupted"
        stretches = taken.power.energies.get(name, [])
        joules, counts = tuple(each for each, _ in stretches), tuple(count for _, count in stretches)
        seconds = tuple(tuple(each["seconds"][name]) for each in times)
        macs = math.fsum(each["macs"][name] for each in times) / len(times)
        series[name] = Series(seconds, macs, peak["host"], peak["device"], joules, counts, why, runtimes.get(name))
    idle = taken.power.idle
    watts = math.fsum(idle) / len(idle) if idle else None
    return Cell(request.batch_size, ending, reason, warmup, settled, series, times[0]["threads"], watts, taken.power.no_idle)


def _take(request: Request, processes: int, meter: Meter | None, deadline: float, timeout: float, progress: Progress | None) -> _Taken:
    """Process after process, until one ends badly: what those before it took counts, and so do its own times if it came as far."""
    taken = _Taken()
    stretches = 0 if meter is None else math.ceil(STRETCHES / processes)
    asked = dataclasses.replace(request, stretches=stretches)
    metered = None if meter is None else _metering(meter, request.stretch_seconds, taken.power)
    for place in range(processes):
        try:
            story = run(asked, deadline, _hearing(request, place, processes, progress), metered)
        except KeyboardInterrupt:
            if not taken.stories:
                raise
            taken.ending, taken.reason = "interrupted", "the bench was interrupted"
            break
        except HesperError as error:
            if not taken.stories:
                raise
            taken.ending, taken.reason = "refused", str(error)
            break
        timed = story.last("times") is not None
        if not timed and story.ending == "done":
            story.ending, story.reason = "crashed", "the process ended without a result"
        if timed or not taken.stories:
            taken.stories.append(story)
        if story.ending != "done":
            taken.ending, taken.reason = _judged(story, bool(taken.stories[0].last("times")), timeout)
            break
    return taken


def _judged(story: Story, timed: bool, timeout: float) -> tuple[Ending, str | None]:
    """How a batch size ended with a process that ended badly; ``timed``, whether there are times all the same."""
    reason = _in_time(story, timeout)
    if story.ending == "interrupted":
        return "interrupted", "the bench was interrupted"
    if story.ending == "out of memory" and timed:  # so the batch did fit
        return "crashed", f"for want of memory after times were taken: {reason}"
    return story.ending, reason


_NO_PEAK: dict[str, Any] = {"host": None, "device": None}


def _memory(request: Request, deadline: float, timeout: float, progress: Progress | None) -> tuple[dict[str, Any], str | None]:
    """Peaks of memory, or none and why; the times are there already, and nothing that goes wrong here may lose them."""
    try:
        looked = run(request, deadline, _hearing(request, 0, 1, progress))
    except HesperError as error:
        return _NO_PEAK, str(error)
    except KeyboardInterrupt:
        return _NO_PEAK, "interrupted"
    peak = looked.last("memory")
    return (_NO_PEAK, f"{looked.ending}: {_in_time(looked, timeout) or 'no result'}") if peak is None else (peak, None)


def _in_time(story: Story, timeout: float) -> str | None:
    return f"it took longer than {timeout:g} s" if story.ending == "timed out" and story.reason is None else story.reason


def _metering(meter: Meter, seconds: float, power: _Power) -> Metered:
    """Reads the meter while a process rests, then while it runs its stretches; those that ended count, whatever comes after."""

    def metered(go: Callable[[], None], until_done: Callable[[], None], story: Story) -> None:
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
                power.no_idle = power.no_idle or idle.reason
                power.idle += [] if idle.watts is None else [idle.watts]
                for each in story.every("stretch"):
                    own = energy(sampler.trace, each["start"], each["end"], idle.watts)
                    power.energies.setdefault(each["subject"], []).append((own, int(each["images"])))

    return metered


def _hearing(request: Request, place: int, processes: int, progress: Progress | None) -> Hear | None:
    """Shows how far the ``place``-th of some processes is."""
    if progress is None:
        return None
    several = f", {processes} processes" if processes > 1 else ""

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            progress(f"Time batches of {request.batch_size}{several}", place * request.rounds + event["count"], processes * request.rounds)
        elif event["event"] == "opened" and place == 0 and request.purpose == "time":
            progress(f"Warm up, batches of {request.batch_size}", 0, 0)
        elif event["event"] == "ready" and processes == 1:
            progress("Measure energy", 0, 0)
        elif event["event"] == "memory":
            progress("Measure memory", 0, 0)

    return hear
