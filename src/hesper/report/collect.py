"""From run folders to the values a page shows. What a record lacks, or holds in another shape, becomes None, and the page says so."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hesper.errors import UsageError
from hesper.heart.gallery import Gallery, load_gallery
from hesper.plan import Plan, on_device, plan_hash
from hesper.report.devices import BenchFacts, benches_of
from hesper.report.patches import fits
from hesper.report.reading import Matrix, column, matrix, number, table
from hesper.runs import Entry, open_run

__all__ = ["Heads", "Outcome", "PerImage", "RunFacts", "Skip", "TokenCounts", "collect", "command"]

DECIDED_ON = "calibration images that fitted nothing"


@dataclass(frozen=True)
class PerImage:
    """Columns over the images of one evaluation: kept share of MACs, drift in nats, agreement (0 or 1)."""

    kept: tuple[float, ...]
    drift: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens left after each block, class token and its like included: mean, fewest and most over images."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One paired evaluation: ``figures`` as recorded (nats, shares, MACs), and what was kept beside them."""

    kind: str
    time: str
    data: str
    figures: Mapping[str, float]
    per_image: PerImage | None
    tokens: TokenCounts | None

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.figures["n"])

    @property
    def macs_stderr(self) -> float | None:
        """Standard error of the kept share of MACs, where the images' own figures are known."""
        if self.per_image is None or len(self.per_image.kept) < 2:
            return None
        return float(np.std(self.per_image.kept, ddof=1)) / math.sqrt(len(self.per_image.kept))


@dataclass(frozen=True)
class Heads:
    """Mean price in nats of removing each head, ``[depth][heads]``, with its standard error (empty where it is not known)."""

    price: Matrix
    stderr: Matrix


@dataclass(frozen=True)
class Skip:
    """A file that was not used, by which kind of entry, and why."""

    kind: str
    file: str
    reason: str


@dataclass(frozen=True)
class DeviceCheck:
    """What a plan on the way to the chosen one was foretold, expected and measured to take on the device, in the budget's unit."""

    foretold: float
    expected: float
    measured: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class RunFacts:
    """Everything a page says about one run. ``outcomes`` begins with what the budget was decided on; ``missing`` is in words."""

    name: str
    plan: Plan
    plan_hash: str
    entries: tuple[Entry, ...]
    outcomes: tuple[Outcome, ...]
    token_prices: Matrix | None
    heads: Heads | None
    survey_images: int | None
    gallery: Gallery | None
    classes: tuple[str, ...]
    explained: tuple[float, ...] | None
    family: str | None
    dial: float | None
    skipped: tuple[Skip, ...]
    missing: tuple[str, ...]
    benches: tuple[BenchFacts, ...] = ()
    checks: tuple[DeviceCheck, ...] = ()
    check_warnings: tuple[str, ...] = ()

    @property
    def main(self) -> Outcome | None:
        """The outcome with the most images: of the evaluations made for their own sake, or else what the budget was decided on."""
        later = [outcome for outcome in self.outcomes if outcome.kind == "eval"]
        return max(later or self.outcomes, key=lambda outcome: (outcome.n, outcome.time), default=None)


def collect(runs: Sequence[str | Path]) -> tuple[RunFacts, ...]:
    """Open the runs and read what they hold; UsageError for no run, or one that is missing, damaged or changed."""
    if not runs:
        raise UsageError("There is no run to report on; name at least one RUN folder.")
    return tuple(_facts(path, name) for path, name in zip(runs, _names(runs), strict=True))


def command(facts: RunFacts) -> str:
    """The command line that makes the run again: as it was recorded, or else put together from the plan."""
    asked, plan = dict(facts.entries[0].asked), facts.plan
    recorded = asked.get("command") or asked.get("argv")
    if isinstance(recorded, str):
        return recorded
    if isinstance(recorded, list) and all(isinstance(word, str) for word in recorded):
        return shlex.join(recorded)
    options = {"macs": "--macs", "loss": "--loss-budget", "disagreement": "--max-disagreement"}
    budget = options.get(plan.budget.kind) or f"--{plan.budget.kind.replace('_', '-')}"
    words = ["hesper", "prune", plan.model.name, "--calib", str(asked.get("calib") or "CALIB")]
    words += [word for key in ("weights", "class_map") if asked.get(key) for word in (f"--{key.replace('_', '-')}", str(asked[key]))]
    words += [budget, f"{plan.budget.value:g}", "--confidence", f"{plan.budget.confidence:g}", "--schedule", plan.schedule]
    if plan.pricing is not None:
        words += ["--criterion", plan.pricing.criterion, "--temperature", f"{plan.pricing.temperature:g}"]
        words += [
            "--draws",
            str(plan.pricing.draws),
            "--rank",
            str(plan.pricing.rank),
            "--gamma",
            f"{plan.pricing.gamma:g}",
            "--rounds",
            str(asked.get("rounds", plan.pricing.rounds)),
        ]
    if plan.tokens:
        first = plan.tokens[0]
        adaptive = ["adaptive", "--multiple", str(asked.get("multiple", first.multiple))]
        words += ["--combine", first.combine, "--counts", *(["fixed"] if first.threshold is None else adaptive)]
    if on_device(plan.budget):
        words += ["--device-batch", str(asked.get("device_batch", 1 if plan.device is None else plan.device.batch_size))]
        words += ["--device-runtime", str(asked["device_runtime"])] if asked.get("device_runtime") else []
        words += ["--meter", str(asked["meter"])] if plan.budget.kind == "energy" and asked.get("meter") else []
    for key in ("heads", "blocks", "batch_size"):
        words += [f"--{key.replace('_', '-')}", str(asked[key])] if asked.get(key) else []
    words += ["--no-refit"] if asked.get("refit") is False else []
    words += ["--refine", str(asked["refine"])] if asked.get("refine") is not None else []
    words += ["--no-tokens"] if asked.get("tokens") is False else []
    return shlex.join([*words, "--seed", str(plan.provenance.seed), "--out", "RUN"])


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The folders' own names, with as much of the way to them as tells them apart."""
    paths = [Path(run).resolve() for run in runs]
    names = ["" for _ in paths]
    for index, path in enumerate(paths):
        others = [other for other in paths if other != path]
        tails = ("/".join(path.parts[-length:]) for length in range(1, len(path.parts) + 1))
        names[index] = next((tail for tail in tails if all(not str(other).endswith("/" + tail) for other in others)), str(path))
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def _facts(path: str | Path, name: str) -> RunFacts:
    run = open_run(path)
    first, anatomy = run.entries[0].results, run.plan.model.anatomy
    atlas = table(first.get("atlas"))
    prices, heads = matrix(atlas.get("tokens"), anatomy.grid[0] * anatomy.grid[1]), matrix(atlas.get("heads"), anatomy.heads)
    gallery, why_not = _gallery(run.path, run.plan)
    outcomes = tuple(outcome for entry in run.entries if (outcome := _outcome(entry, anatomy.depth)) is not None)
    images, dial, family, classes = atlas.get("images"), number(first.get("dial")), first.get("family"), first.get("classes")
    named = isinstance(classes, list) and all(isinstance(item, str) for item in classes)
    missing = [] if why_not is None else [why_not]
    if not any(outcome.kind == "eval" for outcome in outcomes):
        missing.append("No evaluation on other images: run “hesper eval RUN --data DIR” and make the report again.")
    return RunFacts(
        name=name,
        plan=run.plan,
        plan_hash=plan_hash(run.plan),
        entries=run.entries,
        outcomes=outcomes,
        token_prices=prices if prices and len(prices) == anatomy.depth else None,
        heads=Heads(heads, matrix(atlas.get("heads_stderr"), anatomy.heads) or ()) if heads and len(heads) == anatomy.depth else None,
        survey_images=images if isinstance(images, int) else None,
        gallery=gallery,
        classes=tuple(classes) if named and isinstance(classes, list) else (),
        explained=column(first.get("router_explained"), anatomy.depth),
        family=family if isinstance(family, str) else None,
        dial=dial,
        skipped=tuple(skip for entry in run.entries for skip in _skipped(entry)),
        missing=tuple(missing),
        benches=benches_of(run.entries, name),
        checks=_checks(first.get("checks")),
        check_warnings=_texts(first.get("check_warnings")),
    )


def _texts(recorded: object) -> tuple[str, ...]:
    return tuple(item for item in recorded if isinstance(item, str)) if isinstance(recorded, list) else ()


def _checks(recorded: object) -> tuple[DeviceCheck, ...]:
    """The checks that are whole."""
    names = [field.name for field in fields(DeviceCheck)]
    rows = [[number(table(check).get(name)) for name in names] for check in recorded] if isinstance(recorded, list) else []
    return tuple(DeviceCheck(*(value for value in row if value is not None)) for row in rows if None not in row)


def _gallery(folder: Path, plan: Plan) -> tuple[Gallery | None, str | None]:
    """The run's pictures, or why there are none."""
    try:
        gallery = load_gallery(folder)
    except UsageError as error:
        return None, str(error)
    if gallery is None:
        return None, "No pictures: the run folder has no gallery.safetensors; it was deleted, or the run was made without one."
    if not fits(gallery, plan.model.anatomy):
        return None, "No pictures: gallery.safetensors does not fit the plan beside it."
    return gallery, None


def _outcome(entry: Entry, depth: int) -> Outcome | None:
    """What an entry says about an evaluation of the plan, if it holds the four figures nothing can be said without."""
    recorded = table(entry.results.get("evaluation"))
    figures = {name: found for name, value in recorded.items() if (found := number(value)) is not None}
    if not figures.keys() >= {"n", "macs_ratio", "drift_kl", "agreement"} or figures["n"] < 1:
        return None
    if "dial" in entry.asked:  # of another place on the dial than the plan's
        return None
    data = entry.asked.get("data")
    where = data if isinstance(data, str) and entry.kind == "eval" else DECIDED_ON
    per_image = _per_image(table(entry.results.get("per_image")), figures)
    return Outcome(entry.kind, entry.time, where, figures, per_image, _tokens(table(entry.results.get("tokens")), depth))


def _per_image(columns: Mapping[str, Any], figures: Mapping[str, float]) -> PerImage | None:
    n, dense = int(figures["n"]), figures.get("macs_dense", 0.0)
    macs, drift, agreement = (column(columns.get(name), n) for name in ("macs", "drift_kl", "agreement"))
    if macs is None or drift is None or agreement is None or dense <= 0:
        return None
    return PerImage(tuple(count / dense for count in macs), drift, agreement)


def _tokens(columns: Mapping[str, Any], depth: int) -> TokenCounts | None:
    mean, low, high = (column(columns.get(name), depth) for name in ("mean", "min", "max"))
    return None if mean is None or low is None or high is None else TokenCounts(mean, low, high)


def _skipped(entry: Entry) -> list[Skip]:
    listed = entry.results.get("skipped")
    items = [table(item) for item in listed] if isinstance(listed, list) else []
    return [Skip(entry.kind, str(item["file"]), str(item.get("reason", "not said"))) for item in items if "file" in item]
