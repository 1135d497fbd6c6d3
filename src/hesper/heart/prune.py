"""HEART from end to end: model, calibration images and a budget in; plan, grafted model and evidence out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from hesper.curvature import CrossEntropy, DenseKL
from hesper.data import ImageSet, Skipped, check_labels, split
from hesper.errors import OutOfReach, UsageError
from hesper.graft import GraftedViT, graft
from hesper.heart.budget import Chosen, Improvement, check_sample, choose
from hesper.heart.calibrate import Calibration, calibration, landed
from hesper.heart.device import Check, Device, Lesson, Machine, Met, correction, lesson, met
from hesper.heart.family import RARE, SPARSE, STAGES, Family, Heads, Stages, deciding_blocks, steps_of
from hesper.heart.fit import Atlas, FitSums, SurveySums, Tables
from hesper.heart.passes import Passes, Report, StoredLogits
from hesper.heart.placement import Trial, place
from hesper.heart.price import plan_price
from hesper.heart.refit import RefitSums
from hesper.heart.settings import Settings
from hesper.heart.spending import Spending, spending_of
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import Evaluation, estimate
from hesper.parallel import Alone, Team, jointly
from hesper.plan import Estimate, OnDevice, Plan, Pricing, Provenance, on_device
from hesper.runs import utc_now
from hesper.version import __version__
from hesper.work import Kept, KeptNowhere, Work

FIT_SHARE = 0.5
MOST_FIT_IMAGES = 512
TUNE_IMAGES = 128
SURVEY_IMAGES = 64
LEAST_FIT_IMAGES = 64  # for what is learned after the search: fewer teach too little


@dataclass(frozen=True, eq=False)
class Pruned:
    """What pruning found: the chosen plan and how it did, the grafted model, its tables, and the sensitivities behind them.

    ``checks`` are what plans took on the device, the last one's that of the chosen plan, and ``warnings`` what makes them doubtful; none
    where the budget is about no device.
    """

    chosen: Chosen
    model: GraftedViT
    tables: Tables
    atlas: Atlas
    verify: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    seconds: dict[str, float]
    checks: tuple[OnDevice, ...] = ()
    warnings: tuple[str, ...] = ()


def prune(
    model: OpenModel,
    images: ImageSet,
    settings: Settings,
    report: Report | None = None,
    team: Team | None = None,
    work: Work | None = None,
    device: Callable[[Settings], Device] | None = None,
) -> Pruned:
    """Prune ``model`` within a budget, on calibration ``images`` of which half only verify.

    No weight of the network is trained. ``report`` is told (stage, done, total) as work proceeds. Each process of a ``team`` calls
    this alike and gets the same result; ``work`` keeps what is finished. ``device`` gives, once settings are found right, the one that a
    budget on time or energy is about; only the first process of a team asks for it.

    Raises:
        UsageError: a budget out of range, too few images for it, or labels missing.
        JobError: a budget no plan keeps.
    """
    if not settings.tokens and settings.heads == "none":
        raise UsageError("With --no-tokens and --heads none there is nothing to cut; allow one of them.")
    if settings.criterion.needs_labels:
        if images.labels is None:
            raise UsageError(f"The criterion '{settings.criterion.name}' needs labels; give class folders, or use the criterion 'kl'.")
        check_labels(images, model.ref.anatomy.classes)
    if settings.tokens and settings.combine == "merge" and settings.rank > model.ref.anatomy.width:
        raise UsageError(f"The rank must be at most the model's width, {model.ref.anatomy.width}, not {settings.rank}.")
    if settings.multiple != "auto" and settings.multiple >= (tokens := model.ref.anatomy.tokens):
        raise UsageError(f"Counts of {tokens} tokens at most cannot be multiples of {settings.multiple}; use a smaller multiple.")
    if not model.host.heads_removable:
        settings = replace(settings, heads="none")
        if not settings.tokens:
            raise UsageError(f"The heads of {model.ref.name} cannot be removed: its attention output is normalised over all of them.")
    if on_device(settings.budget) and device is None:
        raise UsageError("A budget on time or energy needs a device to measure; prune with hesper.prune, or give one.")
    team = team or Alone()
    passes = Passes(images, settings.batch_size, team, work or KeptNowhere(), report or (lambda stage, done, total: None))
    return _Job(model, images, settings, team, passes, device).run()


class _Job:
    """One pruning job: the model, the split images, and the clock."""

    def __init__(
        self,
        model: OpenModel,
        images: ImageSet,
        settings: Settings,
        team: Team,
        passes: Passes,
        device: Callable[[Settings], Device] | None,
    ) -> None:
        self.model, self.images, self.settings, self.team, self.passes = model, images, settings, team, passes
        self.find_device = device
        self.device: Device | None = None
        self.machine: Machine | None = None
        self.spending = Spending(settings.budget)
        if len(images) < 4:
            raise UsageError(f"Pruning needs at least 4 calibration images, and there are {len(images)}; give more.")
        self.fit, self.verify = split(images, (FIT_SHARE, 1 - FIT_SHARE), settings.seed)
        self.fit = self.fit[:MOST_FIT_IMAGES]
        fitted = {images.digests[index] for index in self.fit}
        # A copy of a fitting image under another name proves nothing.
        self.verify = tuple(index for index in self.verify if images.digests[index] not in fitted)
        self.tune = self.fit[:TUNE_IMAGES]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.seconds: dict[str, float] = {}
        self.logits: dict[str, StoredLogits] = {}

    def run(self) -> Pruned:
        """Fit, search, verify."""
        settings, host = self.settings, self.model.host
        check_sample(settings.budget, len(self.verify))
        started = time.perf_counter()
        self._look_at_device()
        started = self._clock("device", started)
        atlas = self._survey()
        started = self._clock("survey", started)
        tables = self._fit() if settings.tokens or settings.heads == "adaptive" else Tables({}, ())
        started = self._clock("fit", started)
        learned = [] if self.machine is None else self._rehearse(tables, atlas, self.machine)
        started = self._clock("rehearsal", started)
        chosen = self._search(tables, atlas)
        started = self._clock("search", started)
        checks, warnings = (), ()  # type: tuple[OnDevice, ...], tuple[str, ...]
        if self.machine is not None:
            found = self._meet(chosen, self.machine, learned, lambda: self._search(tables, atlas))
            chosen, checks, warnings = found.chosen, found.checks, found.warnings
            started = self._clock("check", started)
        tables = chosen.family.tables
        grafted = graft(host.module, chosen.plan, tables.tensors, check_weights=False)
        verify = self.passes.readable(self.verify)
        made = replace(chosen.plan.provenance, fit_images=len(self.passes.readable(self.fit)), verify_images=len(verify))
        plan = replace(chosen.plan, provenance=made, measured=chosen.measured, points=chosen.points, expected_loss=self._expected(grafted))
        plan = replace(plan, device=checks[-1] if checks else None)
        grafted.plan = plan
        self._clock("price", started)
        skipped = tuple(sorted(self.passes.skipped.values(), key=lambda skip: skip.file))
        return Pruned(replace(chosen, plan=plan), grafted, tables, atlas, verify, skipped, self.seconds, checks, warnings)

    def _search(self, tables: Tables, atlas: Atlas) -> Chosen:
        """The plan of least drift that keeps the budget, on a device as its staircase foretells it."""
        settings, compare = self.settings, self._trial("compare") if len(self.fit) > len(self.tune) else None
        tune, prove = self._trial("tune"), self._trial("verify")
        improvements = (
            Improvement("refit", self._refits_not, self._refit, compare or tune),
            Improvement("refine", self._refines_not, self._refine, tune),
        )
        multiple = self._multiple() if settings.multiple == "auto" else settings.multiple

        def chosen(multiple: int) -> Chosen:
            families = self._families(tables, atlas, multiple)
            return choose(families, settings.budget, tune, prove, compare, improvements, self.spending)

        try:
            return chosen(multiple)
        except OutOfReach:
            if settings.multiple != "auto" or multiple == 1 or settings.counts == "fixed":
                raise
            return chosen(1)

    def _look_at_device(self) -> None:
        """The device a budget is about, and its staircase, which every process needs and the first one measures."""
        if not on_device(self.settings.budget) or self.find_device is None:
            return
        find = self.find_device
        self.device = jointly(self.team, lambda: find(self.settings) if self.team.rank == 0 else None)
        self.machine = self.team.first(None if self.device is None else self.device.machine)
        self.spending = spending_of(self.settings.budget, None if self.machine is None else self.machine.stairs)

    def _rehearse(self, tables: Tables, atlas: Atlas, machine: Machine) -> list[Lesson]:
        """What a usual plan of about the budget teaches of the staircase, before sets of blocks are compared by what that foretells."""
        work = self.passes.work
        kept = self.team.first(work.load("rehearsal"))
        if kept is not None:
            learned = [Lesson(kept.notes["error"], OnDevice(**kept.notes["account"]), tuple(kept.notes["warnings"]))]
        else:
            learned = self._rehearsed(tables, atlas, machine)
            for each in learned:
                notes = {"error": each.error, "account": asdict(each.account), "warnings": list(each.warnings)}
                work.save("rehearsal", Kept({}, notes))
        self.spending = self.spending.corrected(correction(learned))
        return learned

    def _rehearsed(self, tables: Tables, atlas: Atlas, machine: Machine) -> list[Lesson]:
        settings = self.settings
        families = self._families(tables, atlas, self._multiple() if settings.multiple == "auto" else settings.multiple)
        for family in sorted(families, key=lambda each: not each.name.startswith(SPARSE)):
            try:
                (placed,) = place([family], settings.budget, self.spending, self._trial("tune"))
            except OutOfReach:
                continue
            plan = family.at(placed.dial)
            return [lesson(plan, self.spending, machine, self._check(plan, family.tables))]
        return []  # the search says what can be had

    def _check(self, plan: Plan, tables: Tables) -> Check:
        """The device is asked by the first process of a team, and all hear what it takes."""
        self.passes.report("Check on the device", 0, 0)
        model = graft(self.model.host.module, plan, tables.tensors, check_weights=False)
        return self.team.first(jointly(self.team, lambda: None if self.device is None else self.device.check(model)))  # type: ignore[return-value]

    def _meet(self, chosen: Chosen, machine: Machine, learned: Sequence[Lesson], search: Callable[[], Chosen]) -> Met:
        """The plan placed where the device takes what the budget allows; where its family cannot be, all are searched once more."""
        tune, prove = self._trial("tune"), self._trial("verify")

        def again(before: Chosen, spending: Spending) -> Chosen:
            self.spending = spending
            try:
                after = choose([before.family], self.settings.budget, tune, prove, spending=spending, start=before.dial)
            except OutOfReach:
                return search()
            return replace(after, attempts=before.attempts, contenders=before.contenders)

        foretold = self.spending.corrected(1.0)
        return met(chosen, foretold, machine, lambda own: self._check(own.plan, own.family.tables), again, learned)

    def _multiple(self) -> int:
        """Of what counts that adapt are multiples."""
        stairs = self.spending.stairs
        return steps_of(self.model.ref.anatomy) if stairs is None else max(1, stairs.multiple(steps_of(self.model.ref.anatomy)))

    def _survey(self) -> Atlas:
        sums = SurveySums(self.model.host, self.settings.criterion, self.generator)
        self.passes.accumulate("survey", "Survey sensitivities", self.fit[:SURVEY_IMAGES], sums, 16)
        return self.team.first(sums.atlas())

    def _fit(self) -> Tables:
        settings = self.settings
        combine, gates = settings.combine if settings.tokens else None, settings.heads == "adaptive"
        sums = FitSums(self.model.host, settings.criterion, combine, self.generator, gates=gates)
        self.passes.accumulate("fit", "Fit metric and router" if combine else "Fit gates", self.fit, sums)
        # Processors of different makes may solve to other last digits, and every process has to search with the same tables.
        return self.team.first(sums.tables(settings.rank))

    def _expected(self, grafted: GraftedViT) -> Estimate:
        """The second-order price of the plan on survey images, at temperature 1 like the drift it is compared with."""
        loss = CrossEntropy() if self.settings.criterion.name == "ce" else DenseKL()
        survey = self.fit[:SURVEY_IMAGES]
        return estimate(self.passes.column("Price the plan", survey, 8, lambda batch: plan_price(self.model.host, grafted, batch, loss)))

    def _families(self, tables: Tables, atlas: Atlas, multiple: int) -> list[Family]:
        settings, anatomy = self.settings, self.model.ref.anatomy
        merges = settings.tokens and settings.combine == "merge"
        several: tuple[int, ...] = ((2, 1) if settings.rounds == "auto" else (settings.rounds,)) if merges else (1,)
        names: list[Stages] = self._stages(max(several)) if settings.blocks == "auto" else [settings.blocks]
        sets = {deciding_blocks(anatomy, name): name for name in reversed(names)}  # shallow models have the same blocks twice
        stages: dict[str, tuple[int, ...]] = (
            {name: blocks for blocks, name in reversed(sets.items())} if settings.tokens else {"heads alone": ()}
        )
        heads: list[Heads] = ["none", settings.heads] if settings.heads != "none" and settings.tokens else [settings.heads]
        shape = self._shape(tables)

        def family(name: str, rounds: int, kind: Heads) -> Family:
            full = f"{name}, {rounds} rounds, heads {kind}" if rounds > 1 else f"{name}, heads {kind}"
            return Family(full, self._blank(rounds), stages[name], settings.combine, kind, atlas, tables, shape, multiple)

        return [family(name, rounds, kind) for name in stages for rounds in several for kind in heads]

    def _stages(self, rounds: int) -> list[Stages]:
        """Which sets of blocks are measured."""
        usual = [name for name in STAGES if name not in RARE and (rounds == 1 or name in SPARSE)]
        return usual if self.spending.stairs is None else [*RARE, *usual]

    def _shape(self, tables: Tables) -> Calibration | None:
        """How adaptive counts become what was asked for, the same in every process."""
        settings = self.settings
        shape = calibration(
            self.model.host.module,
            tables.tensors,
            lambda: self.passes.batches("Calibrate counts", self.tune[:64], shared=False),
            settings.counts,
            settings.schedule,
        )
        if shape is None:
            return None
        stairs, anatomy = self.spending.stairs, self.model.ref.anatomy
        return lambda plan: self.team.first(shape(plan) if stairs is None else landed(shape(plan), plan, anatomy, stairs.landing))

    def _refit(self, family: Family, dial: float) -> Family:
        """The family with its tables fitted again, where the model is cut as it is at ``dial``."""
        sums = RefitSums(self.model.host, family.at(dial), family.tables, self.settings.criterion, self.generator)
        tables = self.passes.refit(sums, self.fit, self.settings.rank)
        return self._with(family, "fitted again", tables, refit=True)

    def _refits_not(self, family: Family) -> str | None:
        """Why prices are not fitted again along the cut, None where they are."""
        name, images = self.settings.criterion.name, len(self.passes.readable(self.fit))
        if not self.settings.refit:
            return "not asked for"
        if name != "kl":
            return f"prices under the criterion {name} are fitted on the dense model alone"
        return _merges_not(family) or _few("fit", images)

    def _refines_not(self, family: Family) -> str | None:
        """Why merging is not refined, None where it is."""
        if not self.settings.refine:
            return "not asked for"
        return _merges_not(family) or _few("fit and do not place the dial", len(self._spare()))

    def _spare(self) -> tuple[int, ...]:
        """The fitting images that do not place the dial."""
        return self.passes.readable(self.fit[len(self.tune) :])

    def _refine(self, family: Family, dial: float) -> Family:
        """The family with what merging gives back and weighs learned on the fitting images that do not place the dial."""
        epochs = self.settings.refine
        tables = self.passes.refined(self.model.host.module, family.at(dial), family.tables, self._spare(), epochs, self.settings.seed)
        return self._with(family, "refined", tables, refine=epochs)

    def _with(self, family: Family, how: str, tables: Tables, **learned: Any) -> Family:
        """The family with other tables; its plans say what was ``learned``."""
        pricing = None if family.blank.pricing is None else replace(family.blank.pricing, **learned)
        blank = replace(family.blank, pricing=pricing)
        return replace(family, name=f"{family.name}, {how}", blank=blank, tables=tables, calibrated=self._shape(tables))

    def _blank(self, rounds: int) -> Plan:
        settings = self.settings
        anatomy = self.model.ref.anatomy
        criterion = settings.criterion
        pricing = Pricing(criterion.name, criterion.temperature, criterion.draws, settings.rank, settings.gamma, rounds)
        provenance = Provenance(
            __version__,
            torch.__version__,
            version("timm"),
            settings.seed,
            self.images.sha256,
            len(self.fit),
            len(self.verify),
            utc_now(),
        )
        skip_unread = settings.tokens and not anatomy.reads_patches
        return Plan(self.model.ref, pricing, settings.schedule, (), (), skip_unread, settings.budget, None, None, (), provenance)

    def _trial(self, name: Literal["tune", "compare", "verify"]) -> Callable[[Family], Trial]:
        label, indices = {
            "tune": ("Search the dial", self.tune),
            "compare": ("Compare sets of blocks", self.fit),
            "verify": ("Verify on unseen images", self.verify),
        }[name]

        def trial(family: Family) -> Trial:
            if name not in self.logits:
                module = self.model.host.module
                self.logits[name] = self.passes.dense(f"dense-{name}", "Run the dense model", module, indices)
                if name == "verify":  # unreadable files are only known now
                    check_sample(self.settings.budget, len(self.passes.readable(indices)))

            def measured(plan: Plan) -> Evaluation:
                cut = graft(self.model.host.module, plan, family.tables.tensors, check_weights=False)
                return self.passes.evaluate(name, f"{label}: {family.name}", cut, self.logits[name], indices)

            return measured

        return trial

    def _clock(self, name: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = now - started
        return now


def _merges_not(family: Family) -> str | None:
    return None if family.combine == "merge" and family.blocks else "the plan merges nothing"


def _few(which: str, images: int) -> str | None:
    return None if images >= LEAST_FIT_IMAGES else f"{images} images {which}; it takes {LEAST_FIT_IMAGES}"
