"""Reading a meter beside a job: in a thread that sleeps between readings, never spins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from hesper.meters.meter import Meter, MeterLost, Reading
from hesper.meters.trace import Trace

__all__ = ["Sampler"]

PATIENCE = 10.0  # seconds


class Sampler:
    """Reads ``meter`` from the beginning of a ``with`` block until one reading after its end.

    A meter that is lost ends the readings, not the job; :attr:`trace` says so.

    Args:
        meter: one whose probe said that it is usable.
        clock: seconds that only grow.

    Example:
        >>> from hesper.meters import Synthetic, energy
        >>> with Sampler(Synthetic(lambda seconds: 3.0, period=0.005)) as sampler:
        ...     start = time.monotonic()
        ...     time.sleep(0.2)
        ...     end = time.monotonic()
        >>> round(energy(sampler.trace, start, end).watts, 6)
        3.0
    """

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter, self._clock = meter, clock
        self._taken: list[tuple[float, Reading]] = []
        self._lost: str | None = None
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"{meter.name} sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        if not self._first.wait(PATIENCE):  # so that a reading lies before whatever is measured
            self._lost = f"{self._meter.name} has not answered for {PATIENCE:g} s"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():  # a reading that hangs; the job is not to hang with it
            self._lost = self._lost or f"{self._meter.name} has not answered for {PATIENCE:g} s"

    @property
    def trace(self) -> Trace:
        """What was read so far."""
        taken = tuple(self._taken)
        labels = taken[0][1].rails if taken else ()
        rails = {label: tuple(reading.rails.get(label, float("nan")) for _, reading in taken) for label in labels}
        seconds, totals = tuple(at for at, _ in taken), tuple(reading.total for _, reading in taken)
        return Trace(self._meter.name, self._meter.quantity, self._meter.scope, seconds, totals, rails, self._lost)

    def _read(self) -> None:
        due = self._clock()
        try:
            while self._take():
                due += self._meter.period
                late = self._clock() - due
                if late > 0:
                    due += late  # readings that were missed are not made up for
                elif self._stop.wait(-late):
                    self._take()  # the reading after the end
                    return
        finally:
            self._first.set()

    def _take(self) -> bool:
        """Read once; False where nothing more is to be read."""
        over = self._stop.is_set()
        before = self._clock()
        try:
            reading = self._meter.read()
        except MeterLost as error:
            self._lost = str(error)
            return False
        except Exception as error:  # whatever a driver or a program comes up with, the job goes on
            self._lost = f"{self._meter.name} cannot be read: {type(error).__name__}: {error}"
            return False
        after = self._clock()
        self._taken.append(((before + after) / 2 if reading.seconds is None else reading.seconds, reading))
        self._first.set()
        return not over
