"""The plan: what is cut from a model, as plain words. Nothing here needs torch."""

from hesper.plan.dial import at_dial, verified_range
from hesper.plan.show import render
from hesper.plan.toml import dumps, loads, plain, plan_hash, read_plan
from hesper.plan.validate import check_budget, validate
from hesper.plan.vocabulary import (
    SCHEMA,
    Anatomy,
    Budget,
    BudgetKind,
    Combine,
    Estimate,
    HeadCut,
    HeadGate,
    Measured,
    ModelRef,
    OnDevice,
    OperatingPoint,
    Plan,
    Pricing,
    Provenance,
    Schedule,
    TokenCut,
    empty_plan,
    on_device,
)

__all__ = [
    "SCHEMA",
    "Anatomy",
    "Budget",
    "BudgetKind",
    "Combine",
    "Estimate",
    "HeadCut",
    "HeadGate",
    "Measured",
    "ModelRef",
    "OnDevice",
    "OperatingPoint",
    "Plan",
    "Pricing",
    "Provenance",
    "Schedule",
    "TokenCut",
    "at_dial",
    "check_budget",
    "dumps",
    "empty_plan",
    "loads",
    "on_device",
    "plain",
    "plan_hash",
    "read_plan",
    "render",
    "validate",
    "verified_range",
]
