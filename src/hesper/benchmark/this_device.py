"""This device, as pruning for it needs it: how long a model's pieces take, and what a cut model takes beside the dense one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hesper.artefact import save_model
from hesper.benchmark.record import Bench, Cell, Series
from hesper.benchmark.run import bench, card
from hesper.benchmark.subject import timed_images
from hesper.data import ImageSet, LoadedBatch, batches
from hesper.device import lacks_memory
from hesper.errors import Interrupted, JobError, UsageError
from hesper.exporting import export
from hesper.exporting.onnx_pieces import onnx_pieces
from hesper.exporting.onnx_session import runtime_of
from hesper.graft import GraftedViT
from hesper.graft.pieces import Decision, Pieces
from hesper.heart.device import Check, Machine
from hesper.heart.gallery import Gallery, save_gallery
from hesper.heart.settings import Settings
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import evaluate
from hesper.measure.fingerprint import Fingerprint, fingerprint
from hesper.measure.kept_stairs import kept_or_measured
from hesper.measure.processes import Ratio, ratio_in_turns
from hesper.measure.stairs import Stairs, TakeApart, measure_stairs
from hesper.meters import usable
from hesper.plan import dumps
from hesper.runs import MODEL, PLAN, new_run, seal, write_text

__all__ = ["ThisDevice", "find_this_device"]

PROCESSES = 5
ROUNDS, CYCLES = 10, 3  # calls at least, of each process, and of each batch where they are short
LONG = 10.0  # seconds of all batches from which once each will do
LIMIT = 1800.0  # seconds for starting processes and warming up
STRETCH_SECONDS = 5.0  # that a model runs without a pause for its energy
BUSY = 0.1  # share of the processor's time in other jobs' hands, above which a staircase is not kept for later


@dataclass(frozen=True, eq=False)
class ThisDevice:
    """The device that this process computes on, and images, decoded, that are timed on it."""

    machine: Machine
    opened: OpenModel
    timed: tuple[LoadedBatch, ...]
    settings: Settings
    device: str
    meter: str
    warnings: tuple[str, ...] = ()

    def check(self, model: GraftedViT) -> Check:
        """Run a cut model beside the dense one in processes of their own, as ``hesper bench`` does.

        Raises:
            Interrupted: it did not come to an end, or energy could not be read.
        """
        size, kind, dense = self.settings.device_batch, self.settings.budget.kind, self.machine.stairs.dense
        each = max(2, -(-sum(len(batch.images) for batch in self.timed) // size))  # batches that a process makes of the images
        rounds = each * max(CYCLES if each * dense < LONG else 1, -(-ROUNDS // each))  # every image as often as every other
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the processes need the same card
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            self._write(run, model)
            target, how = run, dict[str, Any]()
            if self.settings.device_runtime == "onnx":
                target = _exported(run, run.with_name("run.onnx"))
                how = {"baseline": _exported(run, run.with_name("dense.onnx"), dense=True), "data": run}
            found = bench(
                target,
                **how,
                batch_sizes=(size,),
                device=self.device,
                threads=self.machine.threads,
                rounds=rounds,
                processes=PROCESSES,
                meter=self.meter if kind == "energy" else "none",
                stretch_seconds=STRETCH_SECONDS,
                timeout=LIMIT + 4 * PROCESSES * rounds * dense,
                memory=False,
            )
        (cell,) = found.cells
        if cell.ending == "interrupted":
            raise KeyboardInterrupt
        if cell.ending != "done":
            raise Interrupted(
                f"The pruned model could not be measured on this device: {cell.ending} ({cell.reason}); run the same command again, which "
                "goes on from here."
            )
        share = self._share(found, cell, each)
        evaluation = evaluate(model, self.opened.host.module, self.timed)
        return Check(share.ratio, share.low, share.high, share.processes, evaluation, (*self.warnings, *found.warnings))

    def _write(self, run: Path, model: GraftedViT) -> None:
        cut = model if self.device == "cpu" else copy.deepcopy(model).cpu()
        with new_run(run) as folder:
            write_text(folder / PLAN, dumps(cut.plan))
            save_model(folder / MODEL, self.opened, cut)
            save_gallery(folder, _pictures(self.opened, self.timed))
            seal(folder, "check", asked={}, results={})

    def _share(self, found: Bench, cell: Cell, batches: int) -> Ratio:
        """What the budget is about, of the target by what the dense model takes."""
        target, dense = cell.series["target"], cell.series["baseline"]
        if self.settings.budget.kind == "energy":
            return ratio_in_turns(_joules(target, found, cell), _joules(dense, found, cell))
        mine = [[_mean(seconds, batches)] for seconds in target.processes]
        if self.settings.budget.kind == "latency":
            return ratio_in_turns(mine, [[_mean(seconds, batches)] for seconds in dense.processes])
        return ratio_in_turns(mine, [[self.machine.stairs.dense]] * len(mine))


def _exported(run: Path, file: Path, dense: bool = False) -> Path:
    """A run, or its dense model, as it would be used."""
    try:
        return export(run, out=file, dense=dense).path
    except JobError as error:
        what = "dense" if dense else "pruned"
        raise JobError(f"The {what} model cannot be timed in ONNX Runtime: {error} Or prune with --device-runtime torch.") from error


def find_this_device(
    opened: OpenModel,
    images: ImageSet,
    settings: Settings,
    *,
    device: str = "cpu",
    meter: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> ThisDevice:
    """Find out what this device is, and how long a model's pieces take on it; what is known already is not measured again.

    Args:
        opened: the dense model, on the device.
        images: that can be timed, loaded onto the device.
        settings: of pruning, with a budget on a device.
        device: "cpu" or "cuda".
        meter: that reads energy, where the budget is one.
        progress: told (stage, done, total).

    Raises:
        UsageError: no energy can be read here, or no image.
        JobError: so many images at a time do not fit.
    """
    if settings.budget.kind == "energy":
        with usable(meter, card=card() if device == "cuda" else None) as (read, reason):
            if read is None:
                raise UsageError(
                    f"No energy can be read here ({reason}), so there is none to save; 'hesper doctor' says what would help, and --latency "
                    "prunes for time."
                )
    size, now, onnx = settings.device_batch, fingerprint(), settings.device_runtime == "onnx"
    pieces: TakeApart = onnx_pieces(device, torch.get_num_threads()) if onnx else Pieces
    runtime = runtime_of(device) if onnx else ""
    timed = tuple(batches(images, settings.batch_size, indices=timed_images(len(images), size)))
    shown = None if progress is None else lambda done, total: progress("Measure this device", done, total)

    def measured() -> Stairs:
        if progress:
            progress("Measure this device", 0, 0)
        together = torch.cat([batch.images for batch in timed])
        try:
            pictures = together[torch.arange(size, device=together.device) % len(together)]
            return measure_stairs(opened, pictures, _decisions(settings), pieces=pieces, progress=shown)
        except Exception as error:  # every runtime has its own
            if not lacks_memory(error):
                raise
            raise JobError(f"Batches of {size} images do not fit into this device's memory; use a smaller --device-batch.") from error

    busy = now.state.get("busy")
    doubtful = isinstance(busy, float) and busy > BUSY
    stairs = kept_or_measured(now, opened.ref, device, size, _decisions(settings), measured, runtime=runtime, keep=not doubtful)
    warnings = (f"other jobs took {100 * busy:.0f} % of the processor when this device was first looked at",) if doubtful else ()  # type: ignore[operator]
    return ThisDevice(
        Machine(_words(now, device, runtime), torch.get_num_threads(), stairs), opened, timed, settings, device, meter, warnings
    )


def _decisions(settings: Settings) -> list[Decision]:
    """Those that plans may make, as the settings have it."""
    if not settings.tokens:
        return []
    if settings.combine == "drop":
        return [Decision("drop", 1, settings.rank)]
    rounds = (1, 2) if settings.rounds == "auto" else (settings.rounds,)
    # Drops of counts that adapt are taken to last as long as those that do not: all of them would leave nothing to be timed.
    return [Decision("merge", count, settings.rank, settings.counts == "adaptive") for count in rounds]


def _words(machine: Fingerprint, device: str, runtime: str) -> str:
    names = [machine.fixed.get("board"), machine.fixed.get("cuda") if device == "cuda" else machine.fixed.get("cpu")]
    return ", ".join([*(str(name) for name in names if name)] or ["a processor of unknown make"]) + (f", {runtime}" if runtime else "")


def _mean(seconds: Sequence[float], batches: int) -> float:
    """Seconds of a batch, a mean over all of them, as images differ, of the median of its calls, as something disturbs a few of these."""
    return float(np.mean([np.median(seconds[place::batches]) for place in range(batches)]))


def _pictures(opened: OpenModel, timed: Sequence[LoadedBatch]) -> Gallery:
    """The images that are timed, as a run keeps those of its report, so that processes need neither find nor decode them again."""
    anatomy = opened.ref.anatomy
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (opened.mean, opened.std))
    images = torch.cat([batch.images.cpu() for batch in timed]) * std + mean
    pictures = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    count, nothing = len(pictures), (0,) * len(pictures)
    place = torch.zeros(count, anatomy.depth, anatomy.tokens - anatomy.prefix_tokens, dtype=torch.int16)
    return Gallery(pictures, place, ("",) * count, (1.0,) * count, nothing, nothing)


def _joules(series: Series, found: Bench, cell: Cell) -> Sequence[Sequence[float]]:
    """Joules an image, a stretch after the other as if each were a process; every process has one."""
    if not series.energies or any(each.joules is None for each in series.energies):
        reason = next((each.reason for each in series.energies if each.joules is None), None) or cell.no_idle_because or found.meter_reason
        raise Interrupted(
            f"Energy could not be read while the pruned model ran ({reason}); run the same command again, which goes on from here, or "
            "prune for time with --latency."
        )
    return [[(each.joules or 0.0) / images] for each, images in zip(series.energies, series.images, strict=True)]
