"""Whole images on separate threads: the same result as one after the other, and nothing that belongs to a thread is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hesper.graft.lanes
import hesper.graft.ragged
from hesper.graft import graft
from hesper.graft.lanes import LEAST_PRODUCTS, lanes, share_out
from vits import cuts_of, learned_tables, pictures, plan_for, tables, vit

THREADS, MANY = 3, LEAST_PRODUCTS


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("learned", [False, True])
def test_a_batch_gives_what_it_gives_on_one_thread(monkeypatch: pytest.MonkeyPatch, learned: bool) -> None:
    model, images, asked = vit(), pictures(4 * THREADS), list[int]()
    priced = tables(model) | (learned_tables(model) if learned else {})
    cut = graft(model, plan_for(model, cuts_of("merge", [0, 1], threshold=64.0), skip_unread=True), priced)

    def watched(task: Callable[[int], object], order: Iterable[int], threads: int) -> None:
        asked.append(threads)
        share_out(task, order, threads)

    monkeypatch.setattr(hesper.graft.ragged, "share_out", watched)
    monkeypatch.setattr(hesper.graft.lanes, "LEAST_PRODUCTS", 1)
    with torch.inference_mode():
        together = cut.run(images)
        assert asked and set(asked) == {THREADS} and len(set(together.traffic.fed[:, 1])) > 1
        asked.clear()
        with FlopCounterMode(display=False) as counter:
            alone = cut.run(images)
        assert not asked
    torch.testing.assert_close(together.logits, alone.logits, rtol=1e-6, atol=1e-6)
    # An eighth of them is attention's, which a thread that is not watched would hide.
    assert counter.get_total_flops() == pytest.approx(2 * int(alone.macs.sum()), rel=0.01)


def test_every_image_is_done_once_by_several_threads_with_one_thread_each() -> None:
    done: list[tuple[int, str, int, bool]] = []
    together = threading.Barrier(THREADS, timeout=60)

    def task(image: int) -> None:
        if image < THREADS:
            together.wait()  # none of the first goes on before each has a thread
        done.append((image, threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    for mode in (torch.inference_mode, torch.no_grad):
        done.clear()
        with mode():
            share_out(task, range(20), THREADS)
        assert sorted(image for image, *_ in done) == list(range(20))
        assert len({name for _, name, *_ in done}) == THREADS
        assert {(threads, inference) for *_, threads, inference in done} == {(1, mode is torch.inference_mode)}
    assert torch.get_num_threads() == THREADS
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [THREADS]


def test_what_a_task_raises_is_raised() -> None:
    def task(image: int) -> None:
        if image == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        share_out(task, range(8), THREADS)
    share_out(lambda image: None, range(8), THREADS)


def test_gradients_autocast_counters_and_small_batches_stay_on_their_thread() -> None:
    assert lanes(64, MANY) == 1  # gradients are on
    with torch.no_grad():
        assert lanes(64, LEAST_PRODUCTS - 1) == 1
        assert lanes(64, MANY) == THREADS and lanes(2 * THREADS, MANY) == THREADS and lanes(2 * THREADS - 1, MANY) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert lanes(64, MANY) == 1
        with FlopCounterMode(display=False):
            assert lanes(64, MANY) == 1
        torch.set_num_threads(1)
        assert lanes(64, MANY) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    share_out(lambda image: None, range(8), THREADS)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for threads it does not have would wait for ever
        with contextlib.suppress(BaseException):
            share_out(lambda image: os.write(writing, b"."), range(8), THREADS)
        os._exit(0)
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 100) == b"." * 8
