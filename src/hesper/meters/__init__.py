"""Energy meters: one small protocol, one file for each source, and what becomes of their readings."""

from hesper.meters.choose import METERS, make, survey, usable
from hesper.meters.meter import Availability, Meter, MeterLost, Reading
from hesper.meters.replay import Replay, Synthetic
from hesper.meters.sampler import Sampler
from hesper.meters.trace import Energy, Trace, energy

__all__ = [
    "METERS",
    "Availability",
    "Energy",
    "Meter",
    "MeterLost",
    "Reading",
    "Replay",
    "Sampler",
    "Synthetic",
    "Trace",
    "energy",
    "make",
    "survey",
    "usable",
]
