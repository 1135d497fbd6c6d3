"""From readings to joules: against signals whose energy is known in closed form."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hesper.errors import UsageError
from hesper.meters import MeterLost, Reading, Replay, Sampler, Synthetic, Trace, energy
from hesper.meters.trace import FEWEST


def trace(seconds: np.ndarray, totals: np.ndarray, quantity: str = "watts") -> Trace:
    return Trace("synthetic", quantity, "as recorded", tuple(seconds), tuple(totals))  # type: ignore[arg-type]


@given(st.floats(0.5, 60), st.floats(0.1, 100), st.integers(0, 2**32 - 1), st.floats(0, 0.9))
@settings(max_examples=200, deadline=None)
def test_constant_power_for_a_time_is_their_product(seconds: float, watts: float, seed: int, jitter: float) -> None:
    rng = np.random.default_rng(seed)
    times = (np.arange(60) + jitter * rng.uniform(-0.5, 0.5, 60)) * seconds / 50 - seconds / 25
    found = energy(trace(times, np.full(60, watts)), 0.0, seconds, idle_watts=watts / 4)
    assert found.joules == pytest.approx(watts * seconds, rel=1e-3) and found.reason is None
    assert found.net_joules == pytest.approx(0.75 * watts * seconds, rel=1e-3) and found.watts == pytest.approx(watts, rel=1e-3)


def test_power_that_jumps_between_two_levels_is_not_mean_times_length() -> None:
    times = np.concatenate([np.arange(-0.1, 1, 0.01), np.arange(1, 4.2, 0.04)])  # read four times as often while it is high
    found = energy(trace(times, np.where(times < 1, 20.0, 5.0)), 0.0, 4.0)
    assert found.joules == pytest.approx(20 + 15, rel=0.01)


def test_ends_between_readings_are_interpolated() -> None:
    times = np.arange(0, 10.5, 0.5)
    found = energy(trace(times, times), 0.75, 9.25)  # P = t, so E = (9.25^2 - 0.75^2) / 2, which trapezia give exactly
    assert found.joules == pytest.approx((9.25**2 - 0.75**2) / 2, rel=1e-12) and found.readings == 17


def test_counters_give_differences() -> None:
    times = np.arange(0, 10.5, 0.1)
    found = energy(trace(times, 3 * times + 100, "joules"), 0.75, 9.25, idle_watts=1.0)
    assert found.joules == pytest.approx(25.5) and found.net_joules == pytest.approx(17.0)


TIMES = np.linspace(0, 2, 41)


@pytest.mark.parametrize(
    ("made", "start", "end", "reason"),
    [
        (trace(TIMES, np.ones(41)), 0.5, 0.7, f"{FEWEST} are needed; measure for longer"),
        (trace(TIMES, np.ones(41)), -0.1, 1.5, "no reading before"),
        (trace(TIMES, np.ones(41)), 0.5, 2.5, "no reading after"),
        (trace(TIMES[:0], TIMES[:0]), 0.5, 1.5, "no reading before"),
        (trace(TIMES, np.ones(41)), 1.5, 1.5, "empty"),
        (trace(np.where(TIMES == 1.0, 0.97, TIMES)[[*range(20), 21, 20, *range(22, 41)]], np.ones(41)), 0.2, 1.8, "do not grow"),
        (trace(TIMES, np.where(TIMES == 1.0, math.nan, 1.0)), 0.2, 1.8, "not numbers"),
        (trace(TIMES[(TIMES < 0.7) | (TIMES > 1.2)], np.ones(31)), 0.2, 1.8, "nothing was read for 0.55 s, within the 1.6 s"),
        (trace(TIMES, np.floor(TIMES * 2), "joules"), 0.2, 1.8, "counter moved 3 times"),
        (trace(TIMES, 2 - TIMES, "joules"), 0.2, 1.8, "went back"),
        (trace(np.r_[0:30:0.05, 38:90:0.05], np.ones(600 + 1040)), 5.0, 65.0, "nothing was read for 8.05 s"),
        (dataclasses.replace(trace(TIMES, np.ones(41)), lost="The cable was pulled."), 0.5, 2.5, "after the stretch: The cable was pulled"),
    ],
)
def test_no_energy_has_a_reason_and_is_never_zero(made: Trace, start: float, end: float, reason: str) -> None:
    found = energy(made, start, end, idle_watts=1.0)
    assert found.joules is None and found.net_joules is None and found.watts is None
    assert found.reason is not None and reason in found.reason


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.0001
        return self.now


def test_a_sampler_reads_before_and_after_and_sleeps_between() -> None:
    meter = Synthetic(lambda seconds: 2 + seconds, period=0.01)
    before = time.process_time()
    with Sampler(meter) as sampler:
        start = time.monotonic()
        time.sleep(0.4)
        end = time.monotonic()
    used = time.process_time() - before
    found = sampler.trace
    assert found.seconds[0] <= start and found.seconds[-1] >= end and len(found.seconds) >= 15
    measured = energy(found, start, end)
    begun = start - found.seconds[0]
    assert measured.joules == pytest.approx(0.5 * ((2 + begun + end - start) ** 2 - (2 + begun) ** 2), rel=0.02)
    assert used < 0.2  # a loop that spins would use all of it


class Leaving(Synthetic):
    """A meter that is lost after some readings."""

    def __init__(self, after: int) -> None:
        super().__init__(lambda seconds: 5.0, period=0.005)
        self.left = after

    def read(self) -> Reading:
        if self.left == 0:
            raise MeterLost("The meter is gone.")
        self.left -= 1
        return super().read()


@given(st.floats(5, 20), st.floats(0, 0.1), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_counter_that_moves_in_steps_is_within_a_fortieth(seconds: float, phase: float, seed: int) -> None:
    """A counter that moves every tenth of a second, 50 W before and after, 300 W between; read twenty times a second."""
    times = np.arange(-1, seconds + 1, 0.05) + np.random.default_rng(seed).uniform(-0.01, 0.01)
    moved = np.floor((times + phase) / 0.1) * 0.1 - phase
    joules = 50 * moved + 250 * np.clip(moved, 0, seconds)
    found = energy(trace(times, joules, "joules"), 0.0, seconds)
    assert found.joules == pytest.approx(300 * seconds, rel=1 / 40)


class Odd(Synthetic):
    """A meter that fails in a way nobody thought of, or hangs."""

    def __init__(self, hang: float = 0.0) -> None:
        super().__init__(lambda seconds: 5.0, period=0.005)
        self.hang = hang

    def read(self) -> Reading:
        time.sleep(self.hang)
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte")


def test_a_meter_that_fails_oddly_or_hangs_does_not_stop_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sampler(Odd()) as sampler:
        pass
    assert sampler.trace.lost is not None and "UnicodeDecodeError" in sampler.trace.lost
    monkeypatch.setattr("hesper.meters.sampler.PATIENCE", 0.1)
    started = time.monotonic()
    with Sampler(Odd(hang=1.0)) as sampler:
        pass
    assert time.monotonic() - started < 0.9 and sampler.trace.lost is not None and "has not answered" in sampler.trace.lost


@pytest.mark.parametrize("after", [0, 3])
def test_a_meter_that_goes_away_does_not_stop_the_job(after: int) -> None:
    with Sampler(Leaving(after)) as sampler:
        start = time.monotonic()
        time.sleep(0.1)
        end = time.monotonic()
    assert sampler.trace.lost == "The meter is gone." and len(sampler.trace.seconds) == after
    found = energy(sampler.trace, start, end)
    assert found.joules is None and found.reason is not None and "The meter is gone" in found.reason


def test_a_record_is_played_back(tmp_path: Path) -> None:
    file = tmp_path / "power.csv"
    file.write_text("\ufeffseconds,watts\n5,2\n6,4\n7,4\n", encoding="utf-8")
    clock = Clock()
    meter = Replay(file, clock=clock)
    assert meter.probe().reason == "2 s recorded in power.csv" and meter.read().total == pytest.approx(2.0)
    clock.now += 0.5
    assert meter.read().total == pytest.approx(3.0, abs=0.001)
    clock.now += 2
    with pytest.raises(MeterLost, match="ends after 2 s"):
        meter.read()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seconds,watts\n",
        "seconds,watts\n1,2\n",
        "time,power\n1,2\n2,3\n",
        "seconds,watts\n1,2\n1,3\n",
        "seconds,watts\n1,a\n2,3\n",
        "seconds,watts\n1,2\nnan,3\n",
        "seconds,watts\n1,inf\n2,3\n",
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "power.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match="no power record"):
        Replay(file)
    with pytest.raises(UsageError, match="cannot be read"):
        Replay(tmp_path / "none.csv")
