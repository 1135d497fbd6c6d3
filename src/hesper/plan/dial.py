"""The dial as a knob at run time: the same cuts at another price."""

from __future__ import annotations

import math
from dataclasses import replace

from hesper.errors import UsageError
from hesper.plan.vocabulary import OperatingPoint, Plan

__all__ = ["at_dial", "verified_range"]


def at_dial(plan: Plan, dial: float) -> Plan:
    """The plan with every threshold moved as the dial is, in nats; heads that have left the weights stay as they are.

    What was measured of the plan is left out, since it is of another place on the dial.

    Raises:
        UsageError: the plan cuts by fixed counts and has no dial, or ``dial`` is no price.
    """
    if plan.dial is None:
        raise UsageError("The plan cuts by fixed counts, or only heads for good, so it has no dial; make a run with adaptive counts.")
    if not 0 <= dial < math.inf:
        raise UsageError(f"The dial is a price in nats, 0 or more, not {dial}; 0 keeps everything that can be kept.")
    turn = dial / plan.dial
    moved = tuple(cut if cut.threshold is None else replace(cut, threshold=cut.threshold * turn) for cut in plan.tokens)
    gates = tuple(replace(gate, threshold=gate.threshold * turn) for gate in plan.gates)
    return replace(plan, tokens=moved, gates=gates, dial=dial or None, measured=None, expected_loss=None)


def verified_range(plan: Plan) -> tuple[OperatingPoint, OperatingPoint] | None:
    """The mildest and the strongest operating point that was measured on images that fitted nothing; None where there is none."""
    verified = sorted((point for point in plan.points if point.verified), key=lambda point: point.dial)
    return (verified[0], verified[-1]) if verified else None
