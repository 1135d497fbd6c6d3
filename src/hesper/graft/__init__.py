"""Carrying plans out: the only rooms that run a host's parts."""

from hesper.graft.apply import CURVATURE, graft
from hesper.graft.model import GraftedViT, Outcome, Traffic

__all__ = ["CURVATURE", "GraftedViT", "Outcome", "Traffic", "graft"]
