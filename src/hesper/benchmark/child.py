"""The process that measures: reads a request from its input, writes events to its output, one JSON object a line.

It stands alone so that a crash or a lack of memory ends it and nothing else, and so that one model's peak of memory, loading included,
is not mixed with another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesper.benchmark.request import Request, Subject
from hesper.benchmark.subject import Opened, images_for, open_subject
from hesper.device import lacks_memory, use_device
from hesper.errors import HesperError
from hesper.measure.latency import settle
from hesper.measure.timing import Turns, take_turns
from hesper.precision import use_precision

__all__ = ["GO", "main"]

GO = "go"
MEMORY_CALLS = 3
LEAST_WARMUP = 1.0  # seconds
COMES_BACK = 0.05  # seconds

Tell = Callable[..., None]


class Calls:
    """A model called on one batch after the other, over and over."""

    def __init__(self, model: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
        self.model, self.batches, self.done = model, batches, 0

    def __call__(self) -> None:
        """The next call."""
        self.model(self.batches[self.done % len(self.batches)])
        self.done += 1

    def come_back(self, wait: Callable[[], None]) -> None:
        """Run the batch of the last call again for a while, once at least, as if no other model had run before the next."""
        start = time.perf_counter()
        while True:
            self.model(self.batches[(self.done - 1) % len(self.batches)])
            wait()
            if time.perf_counter() - start >= COMES_BACK:
                return


def main() -> None:
    """Serve one request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not come between the events

    def tell(event: str, **values: Any) -> None:
        out.write(json.dumps({"event": event, **values}) + "\n")
        out.flush()

    try:
        request = Request.loads(sys.stdin.readline())
        serve(request, _commands(), tell)
    except HesperError as error:
        tell("refused", sentence=str(error), exit_code=error.exit_code)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if lacks_memory(error):
            tell("out of memory", sentence=first or type(error).__name__)
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            tell("refused", sentence=f"torch.compile cannot compile here: {first}; mend that, or leave --compile out.", exit_code=1)
        else:
            tell("crashed", sentence=f"{type(error).__name__}: {first}" if first else type(error).__name__)
        sys.exit(1)


def _commands() -> queue.SimpleQueue[str]:
    """What is said to this process from now on; whoever asked being gone, it ends, whatever it is doing."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            said.put(line.strip())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return said


def serve(request: Request, commands: queue.SimpleQueue[str], tell: Tell) -> None:
    """Do what is asked and tell how it goes."""
    use_device(request.device)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    use_precision(request.device, request.precision)
    wait = torch.cuda.synchronize if request.device == "cuda" else lambda: None
    opened = {name: _open(subject, request) for name, subject in request.subjects.items()}
    images = images_for(opened, request.data, request.batch_size, request.device)
    tell("opened", runtimes={name: each.runtime for name, each in opened.items()})
    with torch.inference_mode():
        if request.purpose == "memory":
            _memory(opened, images, wait, tell, request.device)
        else:
            _times(request, opened, images, wait, commands, tell)
    tell("done")


def _open(subject: Subject, request: Request) -> Opened:
    return open_subject(subject, request.device, request.batch_size, request.threads, request.precision, request.compile)


def _times(
    request: Request,
    opened: dict[str, Opened],
    images: Mapping[str, Sequence[Tensor]],
    wait: Callable[[], None],
    commands: queue.SimpleQueue[str],
    tell: Tell,
) -> None:
    jobs = {name: Calls(each.model, images[name]) for name, each in opened.items()}
    warm = settle(jobs, least_seconds=LEAST_WARMUP, synchronise=wait)
    tell("settled", rounds=warm.rounds, settled=warm.settled)
    jobs = {name: Calls(each.model, images[name]) for name, each in opened.items()}  # both begin with the same batch again
    turns = timed(jobs, warm.seconds, request.rounds, wait, lambda count: tell("round", count=count))
    macs = {name: _macs(each, images[name], request.rounds) for name, each in opened.items()}
    tell("times", seconds=dict(turns.seconds), macs=macs, threads=torch.get_num_threads())
    if request.stretches:
        tell("ready")  # at rest, with everything loaded: what the machine draws now is its idle power
        if commands.get() != GO:
            return
        for _ in range(request.stretches):
            for name, job in jobs.items():
                tell("stretch", subject=name, **_stretch(job, request.stretch_seconds, wait, request.batch_size))


def timed(
    jobs: Mapping[str, Calls],
    usual: Mapping[str, float],
    rounds: int,
    wait: Callable[[], None],
    progress: Callable[[int], None] | None = None,
) -> Turns:
    """All jobs in turns; where the ``usual`` call of one is short all come back, so that none is timed in another state than the rest."""
    short = min(usual.values()) < COMES_BACK
    before = (lambda name: jobs[name].come_back(wait)) if short else None
    return take_turns(jobs, rounds=rounds, warmup=0, before=before, synchronise=wait, progress=progress)


def _macs(opened: Opened, images: Sequence[Tensor], rounds: int) -> float:
    """Multiply-accumulates an image of the batches that were timed, each as often as it was."""
    often = Counter(place % len(images) for place in range(rounds))
    return sum(opened.macs(images[place]) * count for place, count in often.items()) / rounds


def _stretch(job: Callable[[], object], seconds: float, wait: Callable[[], None], batch_size: int) -> dict[str, float]:
    calls, start = 0, time.monotonic()
    while (end := time.monotonic()) - start < seconds:
        job()
        wait()
        calls += 1
    return {"start": start, "end": end, "images": calls * batch_size}


def _memory(opened: dict[str, Opened], images: Mapping[str, Sequence[Tensor]], wait: Callable[[], None], tell: Tell, device: str) -> None:
    """The peak of this process's memory, and of the device's, with one model."""
    ((name, each),) = opened.items()
    job = Calls(each.model, images[name])
    for _ in range(MEMORY_CALLS):
        job()
    wait()
    # What other runtimes hold on a device torch does not know.
    known = device == "cuda" and each.subject.kind != "file"
    tell("memory", host=_peak_of_host(), device=torch.cuda.max_memory_allocated() if known else None)


def _peak_of_host() -> int | None:
    """Bytes of main memory that this process held at most, loading included; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):  # on Linux getrusage begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most if sys.platform == "darwin" else most * 1024)
    return None
