"""Calls of a model in a bench: which batch each takes, and what runs before a turn."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from hesper.benchmark.child import COMES_BACK, Calls, timed


class Model:
    """Remembers which batches it was given, and takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.seen = seconds, []

    def __call__(self, batch: Tensor) -> None:
        time.sleep(self.seconds)
        self.seen.append(int(batch))


def calls_of(seconds: float) -> tuple[Model, Calls]:
    model = Model(seconds)
    return model, Calls(model, [torch.tensor(number) for number in range(3)])


def test_every_call_takes_the_next_batch_however_often_it_comes_back() -> None:
    model, calls = calls_of(COMES_BACK / 5)
    for number in range(4):
        model.seen.clear()
        calls.come_back(lambda: None)
        assert set(model.seen) == {(number - 1) % 3}
        calls()
        assert model.seen[-1] == number % 3


@pytest.mark.parametrize("seconds", [0.0, COMES_BACK * 1.2])
def test_it_comes_back_for_a_while_and_once_at_least(seconds: float) -> None:
    model, calls = calls_of(seconds)
    start = time.perf_counter()
    calls.come_back(lambda: None)
    assert time.perf_counter() - start >= COMES_BACK and model.seen


def runs_between(seen: list[int]) -> list[int]:
    """How often the same batch ran in a row."""
    return [len(list(group)) for _, group in itertools.groupby(seen)]


def test_where_one_call_is_short_all_come_back_before_each_turn() -> None:
    (quick, a), (slow, b) = calls_of(COMES_BACK / 10), calls_of(COMES_BACK * 1.2)
    turns = timed({"a": a, "b": b}, {"a": COMES_BACK / 10, "b": COMES_BACK * 1.2}, 3, lambda: None)
    assert len(turns.seconds["a"]) == len(turns.seconds["b"]) == 3
    # The batch of the call before, over and over, then the next.
    assert quick.seen[0] == 2 and quick.seen[-1] == 2 and min(runs_between(quick.seen)[:-1]) > 2
    assert slow.seen == [2, 0, 0, 1, 1, 2]


def test_long_calls_follow_one_another() -> None:
    model, calls = calls_of(COMES_BACK / 10)
    timed({"a": calls}, {"a": COMES_BACK * 2}, 4, lambda: None)
    assert model.seen == [0, 1, 2, 0]
