from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hesper.errors import UsageError
from hesper.measure.timing import compare, take_turns


class Bench:
    """Two jobs on a clock of their own, with what each run takes."""

    def __init__(self, a: Callable[[int], float], b: Callable[[int], float]) -> None:
        self.now, self.calls = 0.0, ""
        self.a, self.b = self._job("a", a), self._job("b", b)

    def _job(self, name: str, takes: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += takes(self.calls.count(name))
            self.calls += name

        return run

    def clock(self) -> float:
        return self.now


def test_times_are_those_of_the_clock_without_warm_up_and_in_turns() -> None:
    bench = Bench(lambda n: 8.0 + n, lambda n: 2.0 + n)
    found = compare(bench.a, bench.b, rounds=4, warmup=2, clock=bench.clock)
    assert bench.calls == "abab" + "ab" + "ba" + "ba" + "ab"
    assert found.a == (10.0, 11.0, 12.0, 13.0) and found.b == (4.0, 5.0, 6.0, 7.0)
    assert found.seconds == (11.5, 5.5) and found.ratio == (11 / 5 + 12 / 6) / 2


def test_what_comes_before_a_turn_is_not_timed() -> None:
    bench = Bench(lambda n: 8.0, lambda n: 2.0)
    turns = take_turns(
        {"a": bench.a, "b": bench.b}, rounds=3, warmup=0, before=lambda name: {"a": bench.a, "b": bench.b}[name](), clock=bench.clock
    )
    assert bench.calls == "aabb" + "bbaa" + "bbaa"
    assert turns.seconds == {"a": (8.0,) * 3, "b": (2.0,) * 3}


def test_several_jobs_take_turns_and_any_two_are_compared() -> None:
    calls: list[str] = []
    ticks = iter(range(10**6))
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    turns = take_turns(jobs, rounds=6, warmup=1, clock=lambda: 2.0 ** next(ticks))
    assert "".join(calls) == "abc" + "abc" + "cba" + "bca" + "acb" + "cab" + "bac"
    # Every look at the clock is twice as late as the one before, so a job takes 4 times as long as the one whose turn was before its own.
    assert turns.seconds["a"] == tuple(4.0**turn for turn in (0, 5, 8, 9, 13, 16))
    assert turns.seconds["c"] == tuple(4.0**turn for turn in (2, 3, 7, 10, 12, 17))
    found = turns.compare("c", "a")
    assert found.ratio == (1 / 4 + 4) / 2 and found.a == turns.seconds["c"] and found.b == turns.seconds["a"]


def test_a_ratio_that_never_changes_is_certain_however_the_machine_drifts() -> None:
    bench = Bench(lambda n: 3.0 * 2.0**n, lambda n: 2.0**n)
    found = compare(bench.a, bench.b, rounds=9, warmup=0, clock=bench.clock)
    assert (found.ratio, found.low, found.high) == pytest.approx((3, 3, 3))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        bench = Bench(lambda n: float(generator.lognormal(0.0, 0.2)) * 2, lambda n: float(generator.lognormal(0.0, 0.2)))
        found = compare(bench.a, bench.b, rounds=25, warmup=0, clock=bench.clock, seed=seed)
        covered += found.low <= 2 <= found.high
    assert 0.88 <= covered / 200 <= 1.0


def test_the_seed_decides_the_interval_and_nothing_else() -> None:
    def run(seed: int) -> object:
        noise = np.random.default_rng(1)
        bench = Bench(lambda n: 1 + float(noise.random()), lambda n: 1 + float(noise.random()))
        return compare(bench.a, bench.b, rounds=41, warmup=1, clock=bench.clock, seed=seed)

    assert run(0) == run(0) and len({str(run(seed)) for seed in range(60)}) > 1


def test_every_look_at_the_clock_waits_for_the_device() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    compare(
        lambda: events.append("a"), lambda: events.append("b"), rounds=3, warmup=0, synchronise=lambda: events.append("wait"), clock=clock
    )
    turn = ["wait", "clock", "{}", "wait", "clock"]
    assert events == [word.format(job) for job in "abbaba" for word in turn]


def test_progress_counts_rounds() -> None:
    seen: list[int] = []
    compare(lambda: None, lambda: sum(range(100)), rounds=3, warmup=0, progress=seen.append)
    assert seen == [1, 2, 3]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one job"):
        take_turns({}, rounds=3, warmup=0)


@pytest.mark.parametrize(("rounds", "warmup"), [(2, 0), (3, -1)])
def test_too_few_rounds_are_refused(rounds: int, warmup: int) -> None:
    with pytest.raises(UsageError, match="at least 3 rounds"):
        compare(lambda: None, lambda: None, rounds=rounds, warmup=warmup)
