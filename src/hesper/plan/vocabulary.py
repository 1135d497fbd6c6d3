"""The words a plan is written in: immutable, without torch, equal when they mean the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA = 6

Combine = Literal["merge", "drop"]
BudgetKind = Literal["macs", "loss", "disagreement", "latency", "latency_ms", "energy"]
Schedule = Literal["asymmetric", "symmetric"]


@dataclass(frozen=True)
class Anatomy:
    """The shape of a vision transformer, as far as plans and multiply-accumulate counts need it.

    ``heads`` and ``mlp_width`` are per block of the dense model; ``prefix_tokens`` (class, register and
    distillation tokens) come first and are never cut; ``reads_patches`` says whether the classifier reads
    patch tokens (pooling) or the prefix only (class token). ``readout_macs`` is what reading the classes out costs an image, None
    where that is one product of width and classes; ``readout_token_macs`` what it costs for every patch left, where pooling attends.
    """

    depth: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    tokens: int
    prefix_tokens: int
    classes: int
    patch_values: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    reads_patches: bool
    readout_macs: int | None = None
    readout_token_macs: int | None = None

    @property
    def channels(self) -> int:
        """Channels of an image."""
        (height, width), (rows, columns) = self.image_size, self.grid
        return self.patch_values // ((height // rows) * (width // columns))


@dataclass(frozen=True)
class ModelRef:
    """Which dense model a plan is for: its name, library, weights and shape."""

    name: str
    library: str
    weights_sha256: str
    anatomy: Anatomy


@dataclass(frozen=True)
class TokenCut:
    """Tokens leave after the attention of ``block``: all whose price in nats is below ``threshold``, or exactly ``remove``.

    With a threshold the dearest of them stay until an image has a ``multiple`` of tokens left (or as many as it had), so that counts
    differ from image to image in steps.
    """

    block: int
    combine: Combine
    threshold: float | None = None
    remove: int | None = None
    multiple: int = 1


@dataclass(frozen=True)
class HeadCut:
    """Heads of ``block`` that leave the weights for good, in ascending order."""

    block: int
    remove: tuple[int, ...]


@dataclass(frozen=True)
class HeadGate:
    """Heads left in ``block`` sit out, image by image, where their predicted price in nats is at most ``threshold``; the dearest stays."""

    block: int
    threshold: float


@dataclass(frozen=True)
class Pricing:
    """How tokens are priced online.

    The criterion behind metric and router with its temperature and draws per image, the metric's rank, the power of the token
    curvature, how many rounds of matching a decision makes, whether metric and router were fitted again where the model is cut, and in how
    many passes over images it was learned what merged tokens get back (0: they have the mean length of their members).
    """

    criterion: str
    temperature: float
    draws: int
    rank: int
    gamma: float
    rounds: int
    refit: bool = False
    refine: int = 0


@dataclass(frozen=True)
class Budget:
    """What was asked for: a kept share of MACs, a loss in nats, a share of changed top-1 decisions, or what a device takes for it.

    The latter is a share of the dense model's time ("latency") or energy ("energy"), or milliseconds a batch ("latency_ms").
    """

    kind: BudgetKind
    value: float
    confidence: float


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over ``n`` samples."""

    mean: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Measured:
    """What the plan did on calibration images that fitted nothing: kept MACs, drift in nats, agreement, and the budget's statement."""

    macs: Estimate
    drift_kl: Estimate
    agreement: Estimate
    statement: str


@dataclass(frozen=True)
class OnDevice:
    """What a plan takes on the device it was made for, in batches of ``batch_size``.

    ``unit`` says of what: "of the dense model's time", "ms" or "of the dense model's energy". ``foretold`` is what the device's staircase
    of latency said beforehand, ``expected`` that with what was learned of it by measuring whole models; ``measured`` with its 95 %
    interval from ``low`` to ``high`` is of ``processes`` that ran the plan beside the dense model. ``threads`` are the processor's.
    """

    device: str
    batch_size: int
    threads: int
    unit: str
    foretold: float
    expected: float
    measured: float
    low: float
    high: float
    processes: int


@dataclass(frozen=True)
class OperatingPoint:
    """One member of the nested family the dial runs through, as measured on ``n`` images; ``verified`` on some that fitted nothing."""

    dial: float
    macs: float
    drift_kl: float
    agreement: float
    n: int
    verified: bool


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from: seed, calibration data, versions and time of making (UTC, ISO 8601)."""

    hesper: str
    torch: str
    timm: str
    seed: int
    data_sha256: str
    fit_images: int
    verify_images: int
    created: str


@dataclass(frozen=True)
class Plan:
    """Everything that will be cut from a model, why, and what it is expected to cost.

    ``dial`` is the price in nats that the thresholds of tokens and gates follow, None where there is no threshold; ``device`` is there
    where the budget is about one.
    """

    model: ModelRef
    pricing: Pricing | None
    schedule: Schedule
    tokens: tuple[TokenCut, ...]
    heads: tuple[HeadCut, ...]
    skip_unread: bool
    budget: Budget
    expected_loss: Estimate | None
    measured: Measured | None
    points: tuple[OperatingPoint, ...]
    provenance: Provenance
    dial: float | None = None
    gates: tuple[HeadGate, ...] = ()
    device: OnDevice | None = None
    schema: int = SCHEMA


def on_device(budget: Budget) -> bool:
    """Whether a budget is about what a device takes.

    >>> on_device(Budget("latency", 0.7, 0.95)), on_device(Budget("macs", 0.7, 0.95))
    (True, False)
    """
    return budget.kind in ("latency", "latency_ms", "energy")


def empty_plan(name: str, anatomy: Anatomy) -> Plan:
    """The plan that cuts nothing.

    >>> tiny = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
    >>> empty_plan("vit_tiny_patch16_224", tiny).tokens
    ()
    """
    return Plan(
        model=ModelRef(name, "timm", "", anatomy),
        pricing=None,
        schedule="asymmetric",
        tokens=(),
        heads=(),
        skip_unread=False,
        budget=Budget("macs", 1.0, 0.95),
        expected_loss=None,
        measured=None,
        points=(),
        provenance=Provenance("", "", "", 0, "", 0, 0, ""),
    )
