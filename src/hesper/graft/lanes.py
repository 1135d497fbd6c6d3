"""Images shared out over a processor's threads, one thread each.

An operator on one image is too small for several threads: they wait for each other longer than they help. Where a batch has
more images than the processor has threads, each thread does whole images instead, with the same result.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

LEAST = 2  # images for each thread; with fewer, some threads wait for the last image
LEAST_PRODUCTS = 16_000_000  # of queries with keys, 32 images of 50 tokens of ViT-Tiny; handing over less takes longer than it saves


def lanes(images: int, products: int) -> int:
    """How many threads should do whole images, ``products`` of queries with keys in all; 1 where operators had better share themselves out.

    Gradients, autocast and dispatch modes, which count operators, belong to a thread and are not passed on to others.

    Example:
        >>> lanes(1, 10**9)
        1
    """
    threads = torch.get_num_threads()
    watched = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None
    return 1 if watched or threads < 2 or images < LEAST * threads or products < LEAST_PRODUCTS else threads


def share_out(task: Callable[[int], object], images: Iterable[int], threads: int) -> None:
    """Do ``task`` for every image, the next by whichever thread is free; raises what a task raised.

    Example:
        >>> done = []
        >>> share_out(done.append, range(5), 2)
        >>> sorted(done)
        [0, 1, 2, 3, 4]
    """
    left, inference = iter(list(images)), torch.is_inference_mode_enabled()

    def lane() -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            for image in left:
                task(image)

    for running in [_pool(os.getpid(), threads).submit(lane) for _ in range(threads)]:
        running.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose operators use no others; a forked process, which has none of them, makes its own."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "hesper-lane", initializer=_one_thread)
    all_there = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_there.wait)
    all_there.wait()
    torch.set_num_threads(before)  # the last number set by any thread is what new threads begin with
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # what a thread asks first becomes its own number, and would replace one that was set before
    torch.set_num_threads(1)
