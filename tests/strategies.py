"""Values of the package's own types for tests: one example plan, and arbitrary ones for hypothesis."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from hesper.plan import (
    Anatomy,
    Budget,
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
    TokenCut,
)

EXAMPLE_ANATOMY = Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False)
EXAMPLE_PLAN = Plan(
    model=ModelRef("vit_tiny_patch16_224", "timm", "ab" * 32, EXAMPLE_ANATOMY),
    pricing=Pricing("kl", 4.0, 3, 48, 0.5, 2),
    schedule="asymmetric",
    tokens=(TokenCut(3, "merge", threshold=0.001), TokenCut(6, "drop", remove=20)),
    heads=(HeadCut(2, (0, 2)), HeadCut(5, (1,))),
    skip_unread=True,
    budget=Budget("loss", 0.05, 0.95),
    expected_loss=Estimate(0.04, 0.001, 200),
    measured=Measured(Estimate(0.6, 0.01, 300), Estimate(0.03, 0.002, 300), Estimate(0.95, 0.01, 300), "KL <= 0.05 with 95 % confidence"),
    points=(OperatingPoint(0.0005, 0.9, 0.001, 0.99, 128, False), OperatingPoint(0.001, 0.6, 0.03, 0.95, 300, True)),
    provenance=Provenance("0.1.0", "2.15.0", "1.0.31", 0, "cd" * 32, 200, 300, "2026-01-01T00:00:00+00:00"),
    dial=0.001,
    gates=(HeadGate(4, 0.0002), HeadGate(5, 0.0002)),
    device=OnDevice("A78", 8, 4, "of the dense model's time", 0.71, 0.7, 0.69, 0.66, 0.72, 5),
)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
counts = st.integers(1, 10**6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
amounts = st.floats(0, 1e9)
estimates = st.builds(Estimate, mean=numbers, stderr=amounts, n=counts)
pairs = st.tuples(counts, counts)
anatomies = st.builds(
    Anatomy,
    depth=st.integers(1, 12),
    width=counts,
    heads=st.integers(1, 8),
    head_dim=counts,
    mlp_width=counts,
    tokens=st.integers(10, 300),
    prefix_tokens=st.integers(0, 5),
    classes=counts,
    patch_values=counts,
    image_size=pairs,
    grid=pairs,
    reads_patches=st.booleans(),
    readout_macs=st.none() | counts,
    readout_token_macs=st.none() | counts,
)
budgets = st.one_of(
    st.builds(Budget, kind=st.just("macs"), value=st.floats(0.01, 1), confidence=st.floats(0.01, 0.99)),
    st.builds(Budget, kind=st.just("loss"), value=st.floats(1e-9, 1e3), confidence=st.floats(0.01, 0.99)),
    st.builds(Budget, kind=st.sampled_from(["latency", "energy"]), value=st.floats(0.01, 1), confidence=st.floats(0.01, 0.99)),
    st.builds(Budget, kind=st.just("latency_ms"), value=st.floats(1e-3, 1e6), confidence=st.floats(0.01, 0.99)),
    st.builds(Budget, kind=st.just("disagreement"), value=st.floats(1e-9, 0.999), confidence=st.floats(0.01, 0.99)),
)
on_devices = st.builds(
    lambda words, batch, threads, processes, unit, foretold, expected, low, more, most: OnDevice(
        words, batch, threads, unit, foretold, expected, low + more, low, low + more + most, processes
    ),
    *(words, counts, counts, counts, words),
    *[st.floats(1e-6, 1e3)] * 3,
    *[st.floats(0, 1e3)] * 2,
)
measurements = st.builds(Measured, macs=estimates, drift_kl=estimates, agreement=estimates, statement=words)
points = st.builds(OperatingPoint, dial=numbers, macs=amounts, drift_kl=numbers, agreement=shares, n=counts, verified=st.booleans())
provenances = st.builds(
    Provenance,
    hesper=words,
    torch=words,
    seed=st.integers(0, 2**63 - 1),
    data_sha256=words,
    fit_images=st.integers(0, 10**6),
    verify_images=st.integers(0, 10**6),
    created=words,
)


@st.composite
def token_cuts(draw: st.DrawFn, block: int, depth: int, priced: bool) -> TokenCut:
    """A cut of ``block``; the counts of ``depth`` such cuts never add up to all tokens of an arbitrary anatomy."""
    combine: Combine = draw(st.sampled_from(get_args(Combine)))
    if priced and draw(st.booleans()):
        return TokenCut(block, combine, threshold=draw(amounts), multiple=draw(st.integers(1, 2)))
    return TokenCut(block, combine, remove=draw(st.integers(0, 4 // depth)))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that obeys every rule."""
    anatomy = draw(anatomies)
    blocks = st.lists(st.integers(0, anatomy.depth - 1), unique=True).map(sorted)
    heads = st.lists(st.integers(0, anatomy.heads - 1), unique=True, min_size=1, max_size=anatomy.heads - 1).map(sorted).map(tuple)
    learned = st.booleans(), st.integers(0, 9)
    rank, rounds = st.integers(0, anatomy.width), st.integers(1, 8)
    pricing = draw(st.none() | st.builds(Pricing, words, st.floats(1e-6, 100), st.integers(1, 64), rank, amounts, rounds, *learned))
    tokens = tuple(draw(token_cuts(block, anatomy.depth, pricing is not None)) for block in draw(blocks))
    gates = tuple(HeadGate(block, draw(amounts)) for block in (draw(blocks) if pricing is not None else []))
    priced = bool(gates) or any(cut.threshold is not None for cut in tokens)
    return Plan(
        model=draw(st.builds(ModelRef, words, words, words, st.just(anatomy))),
        pricing=pricing,
        schedule=draw(st.sampled_from(["asymmetric", "symmetric"])),
        tokens=tokens,
        heads=tuple(HeadCut(block, draw(heads)) for block in (draw(blocks) if anatomy.heads > 1 else [])),
        skip_unread=draw(st.booleans()),
        budget=draw(budgets),
        expected_loss=draw(st.none() | estimates),
        measured=draw(st.none() | measurements),
        points=tuple(draw(st.lists(points, max_size=3))),
        provenance=draw(provenances),
        dial=draw(st.none() | st.floats(1e-9, 1e3)) if priced else None,
        gates=gates,
        device=draw(st.none() | on_devices),
    )
