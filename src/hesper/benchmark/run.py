"""A whole bench: what is compared with what, at which batch sizes, and what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from hesper.benchmark.cell import Progress, cell
from hesper.benchmark.record import Bench, Cell
from hesper.benchmark.request import BASELINE, TARGET, Request, Subject
from hesper.device import use_device
from hesper.errors import HesperError, UsageError
from hesper.exporting.formats import SUFFIXES
from hesper.graft.one_graph import compile_mode
from hesper.hosts.open import HF
from hesper.measure.fingerprint import fingerprint
from hesper.meters import Meter, usable
from hesper.precision import precision_on
from hesper.runs import open_run

__all__ = ["bench", "card", "subject_of"]

NONE = "none"


def bench(
    target: str | Path,
    *,
    baseline: str | Path | None = None,
    batch_sizes: Sequence[int] = (1,),
    data: str | Path | None = None,
    weights: str | Path | None = None,
    baseline_weights: str | Path | None = None,
    provider: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    compile: str | None = None,
    threads: int | None = None,
    rounds: int = 10,
    processes: int = 5,
    meter: str = "auto",
    stretch_seconds: float = 5.0,
    timeout: float = 1800.0,
    memory: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Time a run folder or a dense model beside a baseline, batch size by batch size, in processes of their own.

    Args:
        target: a run folder, a dense model by its name, or a file that :func:`hesper.exporting.export` wrote.
        baseline: likewise; None takes a run's dense model, "none" no baseline.
        batch_sizes: images at a time. Where one lacks memory, larger ones are not tried.
        data: images to run on, or a run that keeps some for its report; without it those of the target.
        weights: a weights file, for a dense model by its name.
        baseline_weights: likewise for the baseline.
        provider: "cpu", "cuda" or "tensorrt": which execution provider of ONNX Runtime runs ``.onnx`` files; None for the device's own.
        device: "cpu" or "cuda".
        precision: of models in PyTorch: "fp32", "tf32" (on NVIDIA cards), "fp16" or "bf16".
        compile: a mode of torch.compile for models in PyTorch, as :func:`hesper.compiled` has them; None for none.
        threads: of the processor; None leaves torch's choice.
        rounds: timed calls of each model in each process, in turns.
        processes: that take times, one after the other, at every batch size: each is one sample of how fast the models are.
        meter: an energy meter's name, "auto" or "none".
        stretch_seconds: how long a model runs without a pause for its energy, once in each process and at least three times.
        timeout: seconds after which a batch size is given up.
        memory: whether to look at the peak of memory too, in a process for each model.
        progress: told (stage, done, total).

    Raises:
        UsageError: wrong input.
        JobError: pretrained weights cannot be had.
    """
    use_device(device)
    if rounds < 3 or processes < 1 or stretch_seconds <= 0 or timeout <= 0 or not batch_sizes or min(batch_sizes) < 1:
        raise UsageError(
            "A bench needs batches of at least 1 image, at least 3 rounds in 1 process, and stretches and a time limit above 0 s."
        )
    own = subject_of(target, weights, provider)
    beside = _baseline(own, baseline, baseline_weights, provider)
    subjects = {TARGET: own} if beside is None else {TARGET: own, BASELINE: beside}
    _check_runtimes(subjects.values(), provider, device, precision, compile)
    where = None if data is None else str(data)
    first = Request(subjects, min(batch_sizes), where, device, threads, rounds, 0, stretch_seconds, "time", precision, compile)
    before, cells = fingerprint(), list[Cell]()
    with usable(meter, card=card() if device == "cuda" else None) as (read, reason):
        for size in sorted(set(batch_sizes)):
            request = dataclasses.replace(first, batch_size=size)
            cells.append(_one(request, processes, memory, cells, read, timeout, progress))
            if cells[-1].ending == "interrupted":
                break
        named = None if read is None else f"{read.name} ({read.scope})"
    words, kinds = (own.words, beside.words if beside else None), (own.kind, beside.kind if beside else None)
    return Bench(*words, *kinds, device, named, reason, before, fingerprint(), tuple(cells), precision, compile)


def _check_runtimes(subjects: Iterable[Subject], provider: str | None, device: str, precision: str, compile: str | None) -> None:
    """UsageError for what the runtimes of the ``subjects`` do not have, or none of them is asked."""
    every = list(subjects)
    precision_on(device, precision)
    if compile is not None:
        compile_mode(compile)
    if provider is not None and not any(each.where.lower().endswith(".onnx") for each in every):
        raise UsageError("--provider is ONNX Runtime's, and nothing here is an .onnx file; leave it out.")
    if (precision != "fp32" or compile is not None) and all(each.kind == "file" for each in every):
        raise UsageError("--precision and --compile are for models in PyTorch, and an exported file has its own; leave them out.")


def _one(
    request: Request,
    processes: int,
    memory: bool,
    before: Sequence[Cell],
    meter: Meter | None,
    timeout: float,
    progress: Progress | None,
) -> Cell:
    """One batch size; once another is finished, what goes wrong is a result like any other, so that nothing measured is lost."""
    size = request.batch_size
    if before and before[-1].ending == "out of memory":
        smaller = next(each.batch_size for each in before if each.ending == "out of memory")
        return Cell(size, "out of memory", f"not tried: {smaller} images did not fit", 0, False, {})
    try:
        return cell(request, processes, memory, meter, timeout, progress)
    except HesperError as error:
        if not any(each.series for each in before):
            raise
        return Cell(size, "refused", str(error), 0, False, {})
    except KeyboardInterrupt:
        if not any(each.series for each in before):
            raise
        return Cell(size, "interrupted", "the bench was interrupted", 0, False, {})


def subject_of(where: str | Path, weights: str | Path | None, provider: str | None = None) -> Subject:
    """What a word on the command line means.

    Raises:
        UsageError: no run folder, though it can only be one; or weights beside a run or a file.
    """
    path = Path(where)
    if path.is_dir() and path.suffix.lower() not in SUFFIXES:
        open_run(path)
        if weights is not None:
            raise UsageError(f"{where} is a run folder, which holds its own weights; leave --weights out.")
        return Subject("run", str(where))
    if path.suffix.lower() in SUFFIXES:
        if weights is not None:
            raise UsageError(f"{where} is an exported file, which holds its own weights; leave --weights out.")
        if not path.is_file():
            raise UsageError(f"There is no file {where}; make it with 'hesper export RUN --out {where}'.")
        return Subject("file", str(where), provider=provider if path.suffix.lower() == ".onnx" else None)
    if not str(where).startswith(HF) and (path.exists() or len(path.parts) > 1):
        raise UsageError(f"{where} is no run folder; give the folder that --out of an earlier command named, or the name of a model.")
    return Subject("dense", str(where), None if weights is None else str(weights))


def card() -> str | int:
    """The graphics card in use, by the name under which NVML knows it too."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return torch.cuda.current_device() if uuid is None else f"GPU-{uuid}"


def _baseline(target: Subject, asked: str | Path | None, weights: str | Path | None, provider: str | None) -> Subject | None:
    if asked is None or str(asked) == NONE:
        if weights is not None:
            raise UsageError("--baseline-weights belong to a baseline that is a model by its name; name it with --baseline.")
        return Subject("dense of a run", target.where) if asked is None and target.kind == "run" else None
    return subject_of(asked, weights, provider)
