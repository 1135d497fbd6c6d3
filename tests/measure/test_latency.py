from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hesper.errors import UsageError
from hesper.measure.latency import WINDOW, latency, settle


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=300))
def test_percentiles_are_in_order_and_within_what_was_seen(seconds: list[float]) -> None:
    found = latency(tuple(seconds))
    assert min(seconds) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= max(seconds)
    below = np.mean(np.asarray(seconds) <= found.p90 + 1e-12)
    assert found.n == len(seconds) and below >= 0.9 - 1 / len(seconds)
    assert found.mean == pytest.approx(sum(seconds) / len(seconds))


def test_no_calls_have_no_latency() -> None:
    with pytest.raises(UsageError, match="at least one call"):
        latency(())


class Device:
    """A clock on which every call of a job takes as long as a list says, its last value for ever."""

    def __init__(self, **lengths: list[float]) -> None:
        self.now, self.lengths, self.calls = 0.0, lengths, dict.fromkeys(lengths, 0)

    def job(self, name: str) -> None:
        lengths, call = self.lengths[name], self.calls[name]
        self.now += lengths[min(call, len(lengths) - 1)]
        self.calls[name] = call + 1


def test_warming_up_ends_when_every_job_has_settled() -> None:
    device = Device(fast=[1.0], slow=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0])
    jobs = {name: lambda name=name: device.job(name) for name in device.lengths}
    found = settle(jobs, most_seconds=1e9, clock=lambda: device.now)
    assert found.settled and 10 + WINDOW <= found.rounds <= 10 + 2 * WINDOW + 1 and set(device.calls.values()) == {found.rounds}


def test_what_never_settles_is_given_up() -> None:
    device = Device(drifting=[1.5**n for n in range(60)])
    found = settle({"drifting": lambda: device.job("drifting")}, most_rounds=20, most_seconds=1e99, clock=lambda: device.now)
    assert (found.rounds, found.settled) == (20, False)
    device = Device(drifting=[1.5**n for n in range(60)])
    found = settle({"drifting": lambda: device.job("drifting")}, most_seconds=200.0, clock=lambda: device.now)
    assert not found.settled and 2 * WINDOW <= found.rounds <= 14
