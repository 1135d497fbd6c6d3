"""Carrying plans out: the only rooms that run a host's parts."""

from hesper.graft.apply import BASELINES, CURVATURE, graft
from hesper.graft.model import GraftedViT, Outcome, Traffic

__all__ = ["BASELINES", "CURVATURE", "GraftedViT", "Outcome", "Traffic", "graft"]
