"""Batches of decoded images: a few threads read and decode ahead, what cannot be decoded is named and skipped."""

from __future__ import annotations

import io
import struct
import sys
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hesper.data.images import ImageSet, LoadedBatch, Skipped, reason, require_readable
from hesper.errors import UsageError

__all__ = ["Batches", "batches"]

# What Pillow raises for damaged files, found by feeding it some: its decoders let their own parsing errors through.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    workers: int = 2,
    indices: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
    start: int = 0,
) -> Batches:
    """Iterate over ``images`` (or those at ``indices``, in that order), so many at a time, the last batch excepted.

    ``share`` (which, of how many) takes every so many-th batch, so that several processes together see each image once, in exactly the
    batches that one process makes; ``start`` leaves out what comes before that place of the order.
    """
    if batch_size < 1 or workers < 1:
        raise UsageError(f"batch size {batch_size} and workers {workers} must be at least 1")
    chosen = range(len(images)) if indices is None else indices
    which, of = share
    blocks = range(which * batch_size, len(chosen), of * batch_size)
    spans = [range(max(block, start), min(block + batch_size, len(chosen))) for block in blocks]
    order = ((place, chosen[place]) for span in spans for place in span)
    return Batches(images, batch_size, workers, order, sum(map(len, spans)), whole=of == 1 and start == 0)


class Batches(Iterator[LoadedBatch]):
    """The iterator ``batches`` returns; of ``asked`` images ``yielded`` and ``skipped`` tell while it runs, final at its end.

    Files that cannot be decoded are skipped, and their batch is smaller by them: filled from the files after them, batches would be
    other ones in every share. What is yielded depends on the data alone, not on the threads' timing. UsageError when no file at all
    of the ``whole`` could be decoded or the transform's shapes differ.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, workers: int, order: Iterable[tuple[int, int]], asked: int, *, whole: bool
    ) -> None:
        self.asked = asked
        self.yielded = 0
        self.skipped: tuple[Skipped, ...] = ()
        self._images, self._batch_size, self._whole = images, batch_size, whole
        # It knows nothing of this object: an iterator that nobody holds any more then ends its threads at once.
        self._run = _decoded(images, order, workers, ahead=batch_size + workers)

    def __next__(self) -> LoadedBatch:
        try:
            return self._following()
        except BaseException:  # whatever ends it, the end included, ends it for good
            self._whole = False
            self.close()
            raise

    def _following(self) -> LoadedBatch:
        ready: list[_Decoded] = []
        for decoded in self._run:
            if isinstance(decoded.image, str):
                self.skipped += (Skipped(self._images.files[decoded.index], decoded.image),)
            else:
                ready.append(decoded)
            if ready and (decoded.place + 1) % self._batch_size == 0:
                return self._batch(ready)
        if ready:
            return self._batch(ready)
        if self._whole and self.yielded == 0 and self.skipped:
            require_readable(self._images, self.skipped)
        raise StopIteration

    def close(self) -> None:
        """Stop early: cancel what is waiting to be decoded and end the threads."""
        self._run.close()

    def _batch(self, ready: list[_Decoded]) -> LoadedBatch:
        pictures = [decoded.image for decoded in ready if isinstance(decoded.image, Tensor)]
        shapes = {tuple(image.shape) for image in pictures}
        if len(shapes) > 1:
            raise UsageError(f"the transform gives images of different shapes, {sorted(shapes)}; make it resize and crop to one")
        self.yielded += len(ready)
        labels, device = self._images.labels, self._images.device
        return LoadedBatch(
            torch.stack(pictures).to(device),
            None if labels is None else torch.tensor([labels[each.index] for each in ready], dtype=torch.int64, device=device),
            tuple(self._images.files[each.index] for each in ready),
            tuple(each.place for each in ready),
        )


@dataclass(frozen=True, eq=False)
class _Decoded:
    place: int
    index: int
    image: Tensor | str


def _decoded(images: ImageSet, order: Iterable[tuple[int, int]], workers: int, *, ahead: int) -> Generator[_Decoded, None, None]:
    # At most ``ahead`` images wait decoded, which bounds memory and still keeps a batch coming while the model works.
    left = iter(order)
    pool = _threads(workers)
    try:
        queue: deque[tuple[int, int, Future[Tensor | str]]] = deque()
        queue.extend((place, index, pool.submit(_decode, images, index)) for place, index in islice(left, ahead))
        while queue:
            place, index, future = queue.popleft()
            queue.extend((after, following, pool.submit(_decode, images, following)) for after, following in islice(left, 1))
            yield _Decoded(place, index, future.result())
    finally:
        if not sys.is_finalizing():  # then the interpreter has ended the threads, and what shutting down needs is gone
            pool.shutdown(wait=True, cancel_futures=True)


def _threads(workers: int) -> ThreadPoolExecutor:
    """Threads whose operators use no others.

    With helpers under each decoding thread there are more threads than cores, even while they rest. GNU's OpenMP then lets none wait
    busily, every operator of a model wakes its helpers anew, and a pruned one was seen to take 1.4 times as long.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "hesper-decode", initializer=_one_thread)
    all_there = threading.Barrier(workers + 1, timeout=60)
    try:
        for _ in range(workers):
            pool.submit(all_there.wait)
        all_there.wait()
    except BaseException:
        all_there.abort()  # those that wait would be waited for when the interpreter ends
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)  # the last number set by any thread is what new threads begin with
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # what a thread asks first becomes its own number, and would replace one that was set before
    torch.set_num_threads(1)


def _decode(images: ImageSet, index: int) -> Tensor | str:
    try:
        with Image.open(io.BytesIO(images.source.read(images.files[index]))) as image:
            rgb = _rgb(image)
    except _UNREADABLE as error:
        return reason(error)
    return images.transform(rgb)  # outside the try: a transform that fails is a mistake to see, not a file to skip


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 255 when it converts them; 16-bit values keep their contrast when scaled first.
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    # Pillow warns about palettes with transparency unless they pass through RGBA; the colours come out the same.
    return (image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image).convert("RGB")
