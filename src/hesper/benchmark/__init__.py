"""The bench: a model against its dense one on this device, in processes of their own, in turns, with its energy where a meter is."""

from hesper.benchmark.record import Bench, Cell, Series
from hesper.benchmark.request import Subject
from hesper.benchmark.run import bench

__all__ = ["Bench", "Cell", "Series", "Subject", "bench"]
