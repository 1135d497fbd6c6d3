"""Passes over calibration images: each process takes its share, what is finished is kept, and all learn the result."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hesper.curvature import Batch
from hesper.data import ImageSet, LoadedBatch, Skipped, batches, require_readable
from hesper.graft import GraftedViT
from hesper.heart.fit import Tables
from hesper.heart.refine import Refinement
from hesper.heart.refit import RefitSums
from hesper.measure.evaluate import Evaluation, Share, join, measure
from hesper.parallel import Team, jointly
from hesper.plan import Plan
from hesper.work import Kept, Pace, Work

Report = Callable[[str, int, int], None]
REFIT_BATCH, REFINE_BATCH = 16, 32


class Sums(Protocol):
    """Sums over images, to which batches and other processes add."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, float64 on the CPU."""

    def add(self, batch: Batch) -> None:
        """Add a batch."""


class Passes:
    """All passes over one set of images; ``skipped`` holds, by name, the files that could not be decoded in any of them."""

    def __init__(self, images: ImageSet, batch_size: int, team: Team, work: Work, report: Report) -> None:
        self.images, self.batch_size, self.team, self.work, self.report = images, batch_size, team, work, report
        self.skipped: dict[str, Skipped] = {}

    def batches(
        self, stage: str, indices: Sequence[int], size: int | None = None, *, shared: bool = True, start: int = 0
    ) -> Iterator[LoadedBatch]:
        """This process's batches (or, not ``shared``, all) from place ``start`` on, reporting progress as they are taken."""
        share = (self.team.rank, self.team.size) if shared else (0, 1)
        size = min(size or self.batch_size, self.batch_size)
        loader = batches(self.images, size, indices=indices, share=share, start=start)
        done = 0
        self.report(stage, 0, loader.asked)
        for batch in loader:
            self._note(loader.skipped)
            yield batch
            done += len(batch.images)
            self.report(stage, done, loader.asked)
        self._note(loader.skipped)

    def accumulate(self, name: str, stage: str, indices: Sequence[int], sums: Sums, size: int | None = None) -> None:
        """Add all images to ``sums``, going on with what is kept under ``name``; afterwards every process has the whole sums."""
        tensors = sums.tensors()
        jointly(self.team, lambda: self._add(name, stage, indices, sums, size))
        self.team.sum(tensors.values())
        self._pool(indices)

    def _add(self, name: str, stage: str, indices: Sequence[int], sums: Sums, size: int | None) -> None:
        """Add this process's images to ``sums``, going on with what is kept under ``name``."""
        tensors, start, pace = sums.tensors(), 0, Pace()
        if (kept := self.work.load(name)) is not None:
            for key, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(kept.arrays[key]))
            start = int(kept.notes["next"])
            self._note([Skipped(*skip) for skip in kept.notes["skipped"]])
        for batch in self.batches(stage, indices, size, start=start):
            sums.add(batch)
            start = batch.places[-1] + 1
            if pace.due():
                with pace.keeping():
                    self._keep(name, {key: tensor.numpy() for key, tensor in tensors.items()}, next=start)
        self._keep(name, {key: tensor.numpy() for key, tensor in tensors.items()}, next=len(indices))

    def dense(self, name: str, stage: str, module: nn.Module, indices: Sequence[int]) -> StoredLogits:
        """The dense model's logits on this process's batches, kept under ``name``."""

        def stored_or_made() -> StoredLogits:
            stored = self._stored(name)
            return self._dense(name, stage, module, indices) if stored is None else stored

        logits = jointly(self.team, stored_or_made)
        self._pool(indices)
        return logits

    def evaluate(self, name: str, stage: str, cut: GraftedViT, dense: StoredLogits, indices: Sequence[int]) -> Evaluation:
        """The evaluation of all images by all processes; kept by what the plan cuts, under ``name``."""
        name = f"{name}-{_identity(cut)}"
        share = jointly(self.team, lambda: self._measured(name, stage, cut, dense, indices))
        return join(self.team.every(share))

    def _measured(self, name: str, stage: str, cut: GraftedViT, dense: StoredLogits, indices: Sequence[int]) -> Share:
        """This process's share, kept under ``name``."""
        if (kept := self.work.load(name)) is not None:
            columns = {key: array for key, array in kept.arrays.items() if key not in ("tokens", "heads", "places")}
            places = kept.arrays["places"]
            files = tuple(self.images.files[indices[place]] for place in places)
            return Share(
                columns, kept.arrays["tokens"], kept.arrays["heads"], places, files, kept.notes["macs_dense"], kept.notes["seconds"]
            )
        share = measure(cut, dense, self.batches(stage, indices))
        arrays = {**share.columns, "tokens": share.tokens, "heads": share.heads, "places": share.places}
        self._keep(name, arrays, macs_dense=share.macs_dense, seconds=share.seconds)
        return share

    def refit(self, sums: RefitSums, indices: Sequence[int], rank: int) -> Tables:
        """Tables fitted again along a cut model, the same in every process."""
        # Every process asks for the same digest: the tables it starts from came from one.
        name = f"refit-{_digest(_cuts(sums.cut.plan), sums.start.tensors)}"
        self.accumulate(name, "Fit along the cut", indices, sums, REFIT_BATCH)
        return self.team.first(sums.tables(rank))

    def refined(self, module: nn.Module, plan: Plan, tables: Tables, indices: Sequence[int], epochs: int, seed: int) -> Tables:
        """What is learned of merging in so many passes over shuffled images, each process giving its part of every step's."""
        together = min(REFINE_BATCH, self.batch_size)
        generator = torch.Generator().manual_seed(seed)
        order = [indices[place] for _ in range(epochs) for place in torch.randperm(len(indices), generator=generator).tolist()]
        steps = len(order) // together  # whole ones, so that nobody waits for the others in a step that they do not make
        # The same steps whatever the number of processes, whose parts of one may differ by an image, or be nothing.
        own = [index for step in range(steps) for index in order[step * together : (step + 1) * together][self.team.rank :: self.team.size]]
        part = len(own) // max(steps, 1)
        refinement = Refinement(module, plan, tables, steps, seed, self.team)
        name, pace = f"refined-{_digest(_cuts(plan) + repr(order), tables.tensors)}", Pace()
        # Slopes are summed, so after as many steps all stand at the same place, and each may go on where the furthest has got to.
        found = [kept for kept in self.team.every(self.work.load(name)) if kept is not None]
        if kept := max(found, key=lambda kept: int(kept.notes["next"]), default=None):
            refinement.go_on({key: torch.from_numpy(array) for key, array in kept.arrays.items()})
        start = int(refinement.done)
        nothing = itertools.repeat(None, steps - start)
        for batch in self.batches("Refine merging", own, part, shared=False, start=start * part) if part else nothing:
            refinement.add(batch)
            if pace.due():
                with pace.keeping():
                    self._keep(name, {key: tensor.numpy() for key, tensor in refinement.tensors().items()}, next=int(refinement.done))
        self._keep(name, {key: tensor.numpy() for key, tensor in refinement.tensors().items()}, next=int(refinement.done))
        return self.team.first(refinement.tables())

    def column(self, stage: str, indices: Sequence[int], size: int, value: Callable[[Batch], Tensor]) -> NDArray[np.float64]:
        """One number for each image, in order: ``value`` gives them for a batch, ``[images]``."""
        seen = self.batches(stage, indices, size)
        found = jointly(self.team, lambda: [(batch.places, value(batch).double().cpu().numpy()) for batch in seen])
        every = [pair for pairs in self.team.every(found) for pair in pairs]
        order = np.argsort(np.concatenate([places for places, _ in every]), kind="stable")
        column: NDArray[np.float64] = np.concatenate([values for _, values in every])[order]
        return column

    def readable(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Those of the images that no pass failed to decode."""
        return tuple(index for index in indices if self.images.files[index] not in self.skipped)

    def _stored(self, name: str) -> StoredLogits | None:
        """Logits as they were left, or None where they are not there or damaged."""
        kept = self.work.load(name)
        if kept is None:
            return None
        try:
            rows = self.work.rows(name, tuple(kept.notes["shape"]), kept.notes["dtype"], new=False)
        except OSError:
            return None
        if _rows_sha256(rows) != kept.notes.get("sha256"):
            return None
        self._note([Skipped(*skip) for skip in kept.notes["skipped"]])
        return StoredLogits(rows, kept.notes["ends"])

    def _dense(self, name: str, stage: str, module: nn.Module, indices: Sequence[int]) -> StoredLogits:
        """Logits of this process's batches, kept under ``name``."""
        ends: list[int] = []
        rows: NDArray[Any] = np.empty((0, 0), np.float32)
        for batch in self.batches(stage, indices):
            with torch.inference_mode():
                logits = module(batch.images).cpu().numpy()
            start = ends[-1] if ends else 0
            if not ends:
                rows = self.work.rows(name, (self._most(indices), logits.shape[1]), logits.dtype, new=True)
            rows[start : start + len(logits)] = logits
            ends.append(start + len(logits))
        if isinstance(rows, np.memmap):
            rows.flush()  # before they are called finished
        self._keep(name, {}, ends=ends, shape=list(rows.shape), dtype=str(rows.dtype), sha256=_rows_sha256(rows))
        return StoredLogits(rows, ends)

    def _most(self, indices: Sequence[int]) -> int:
        """The most images that can be this process's share."""
        together = self.team.size * self.batch_size
        return min(len(indices), -(-len(indices) // together) * self.batch_size)

    def _keep(self, name: str, arrays: dict[str, NDArray[Any]], **notes: Any) -> None:
        skipped = [[skip.file, skip.reason] for skip in self.skipped.values()]
        self.work.save(name, Kept(arrays, {**notes, "skipped": skipped}))

    def _note(self, skipped: Sequence[Skipped]) -> None:
        self.skipped |= {skip.file: skip for skip in skipped}

    def _pool(self, indices: Sequence[int]) -> None:
        """Tell each other what was skipped; UsageError where that is everything."""
        for skipped in self.team.every(tuple(self.skipped.values())):
            self._note(skipped)
        if not self.readable(indices):
            require_readable(self.images, tuple(self.skipped.values()))


class StoredLogits(Sequence[Tensor]):
    """Logits batch by batch, ``[batch, classes]`` each, from rows that may lie on disk."""

    def __init__(self, rows: NDArray[Any], ends: Sequence[int]) -> None:
        self.rows, self.ends = rows, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        start = self.ends[index - 1] if index else 0
        return torch.from_numpy(np.array(self.rows[start : self.ends[index]]))  # a copy: the rows on disk may be read-only


def _identity(cut: GraftedViT) -> str:
    """What tells one cut model of the same network from another: what it cuts and how that is priced, and the tables."""
    tables = {**cut.deciders.state_dict(prefix="deciders."), **cut.gates.state_dict(prefix="gates."), "size_exponent": cut.size_exponent}
    return _digest(_cuts(cut.plan), tables)


def _cuts(plan: Plan) -> str:
    """What a plan cuts and how that is priced."""
    return repr((plan.pricing, plan.tokens, plan.heads, plan.gates, plan.skip_unread))


def _rows_sha256(rows: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()


def _digest(words: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(words.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
