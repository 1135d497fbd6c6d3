"""This device, as pruning for it needs it: how long a model's pieces take, and what a cut model takes beside the dense one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hesper.artefact import save_model
from hesper.benchmark.record import Cell, Series
from hesper.benchmark.run import bench, card
from hesper.benchmark.subject import timed_images
from hesper.data import ImageSet, batches, require_readable
from hesper.errors import JobError, UsageError
from hesper.graft import GraftedViT
from hesper.graft.pieces import Decision
from hesper.heart.device import Check, Machine
from hesper.heart.settings import Settings
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import evaluate
from hesper.measure.fingerprint import Fingerprint, fingerprint
from hesper.measure.kept_stairs import kept_or_measured
from hesper.measure.processes import Ratio, ratio_in_turns
from hesper.measure.stairs import measure_stairs
from hesper.meters import usable
from hesper.plan import dumps
from hesper.runs import MODEL, PLAN, new_run, seal, write_text

__all__ = ["ThisDevice", "find_this_device"]

PROCESSES = 5
ROUNDS = 10  # at least, of each process
STRETCH_SECONDS = 5.0  # that a model runs without a pause for its energy
BUSY = 0.1  # share of the processor's time in other jobs' hands, above which a staircase is not kept for later


@dataclass(frozen=True, eq=False)
class ThisDevice:
    """The device that this process computes on; ``data`` is where ``images`` come from, for processes that open them themselves."""

    machine: Machine
    opened: OpenModel
    images: ImageSet
    data: str
    settings: Settings
    device: str
    meter: str

    def check(self, model: GraftedViT) -> Check:
        """Run a cut model beside the dense one in processes of their own, as ``hesper bench`` does.

        Raises:
            JobError: it did not come to an end, or energy could not be read.
        """
        size, kind = self.settings.device_batch, self.settings.budget.kind
        places = timed_images(len(self.images), size)
        each = -(-len(places) // size)  # batches
        rounds = each * max(1, -(-ROUNDS // each))  # every image as often as every other
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            self._write(run, model)
            found = bench(
                run,
                batch_sizes=(size,),
                data=self.data,
                device=self.device,
                threads=self.machine.threads,
                rounds=rounds,
                processes=PROCESSES,
                meter=self.meter if kind == "energy" else "none",
                stretch_seconds=STRETCH_SECONDS,
            )
        (cell,) = found.cells
        if cell.ending == "interrupted":
            raise KeyboardInterrupt
        if cell.ending != "done":
            raise JobError(f"The pruned model could not be measured on this device: {cell.ending} ({cell.reason}).")
        share = self._share(cell)
        loader = batches(self.images, min(size, self.settings.batch_size), indices=places)
        evaluation = evaluate(model, self.opened.host.module, loader)
        return Check(share.ratio, share.low, share.high, share.processes, evaluation)

    def _write(self, run: Path, model: GraftedViT) -> None:
        cut = model if self.device == "cpu" else copy.deepcopy(model).cpu()
        with new_run(run) as folder:
            write_text(folder / PLAN, dumps(cut.plan))
            save_model(folder / MODEL, self.opened, cut)
            seal(folder, "check", asked={}, results={})

    def _share(self, cell: Cell) -> Ratio:
        """What the budget is about, of the target by what the dense model takes."""
        target, dense = cell.series["target"], cell.series["baseline"]
        if self.settings.budget.kind == "latency":
            return ratio_in_turns(target.processes, dense.processes)
        if self.settings.budget.kind == "latency_ms":
            foretold = self.machine.stairs.dense
            return ratio_in_turns(target.processes, [[foretold] * len(times) for times in target.processes])
        return ratio_in_turns(_joules(target, cell), _joules(dense, cell))


def find_this_device(
    opened: OpenModel,
    images: ImageSet,
    data: str,
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
        data: where they come from.
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
    size, now = settings.device_batch, fingerprint()
    shown = None if progress is None else lambda done, total: progress("Measure this device", done, total)

    def measured() -> object:
        found = [batch.images for batch in batches(images, size, indices=timed_images(len(images), size)[:size])]
        if not found:
            require_readable(images, images.skipped)
        batch = torch.cat(found)
        try:
            pictures = batch[torch.arange(size, device=batch.device) % len(batch)]
            return measure_stairs(opened, pictures, _decisions(settings), progress=shown)
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and "alloc" not in str(error).lower():
                raise
            raise JobError(f"Batches of {size} images do not fit into this device's memory; use a smaller --device-batch.") from error

    stairs = kept_or_measured(now, opened.ref, device, size, _decisions(settings), measured, keep=not _busy(now))  # type: ignore[arg-type]
    return ThisDevice(Machine(_words(now, device), torch.get_num_threads(), stairs), opened, images, data, settings, device, meter)


def _decisions(settings: Settings) -> list[Decision]:
    """Those that plans may make, as the settings have it."""
    if not settings.tokens:
        return []
    if settings.combine == "drop":
        return [Decision("drop", 1, settings.rank)]
    rounds = (1, 2) if settings.rounds == "auto" else (settings.rounds,)
    return [Decision("merge", count, settings.rank) for count in rounds]


def _words(machine: Fingerprint, device: str) -> str:
    names = [machine.fixed.get("board"), machine.fixed.get("cuda") if device == "cuda" else machine.fixed.get("cpu")]
    return ", ".join(str(name) for name in names if name) or "a processor of unknown make"


def _busy(machine: Fingerprint) -> bool:
    busy = machine.state.get("busy")
    return isinstance(busy, float) and busy > BUSY


def _joules(series: Series, cell: Cell) -> Sequence[Sequence[float]]:
    """Joules an image, a stretch after the other as if each were a process; every process has one."""
    if not series.energies or any(each.joules is None for each in series.energies):
        reason = next((each.reason for each in series.energies if each.joules is None), cell.no_idle_because)
        raise JobError(f"Energy could not be read while the pruned model ran: {reason}. Try again, or prune for time with --latency.")
    return [[(each.joules or 0.0) / images] for each, images in zip(series.energies, series.images, strict=True)]
