"""One page from many runs: the values of ``collect`` and the drawings of ``charts`` and ``patches``, set by the template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from hesper.errors import DISK_FULL, JobError, UsageError
from hesper.plan import Budget, HeadCut, HeadGate, TokenCut
from hesper.report import charts, figures
from hesper.report.charts import Chosen, Interval, Series
from hesper.report.collect import Outcome, RunFacts, collect, command
from hesper.report.device_charts import speedup_chart
from hesper.report.devices import BenchFacts, bench_file
from hesper.report.fronts import fronts_of
from hesper.report.patches import Exhibit, exhibits
from hesper.report.svg import Colours, colours
from hesper.runs import write_bytes

__all__ = ["write_report"]

MOST_SKIPPED = 25
LONG = 12


@dataclass(frozen=True)
class BlockRow:
    """One block in words and figures: the tokens it is left with, what is cut there, and how well its router predicts."""

    block: int
    tokens: tuple[float, float, float] | None
    cut: str
    heads: str
    explained: float | None


@dataclass(frozen=True)
class Pricing:
    """The loss a plan was expected to cost beside the loss it was measured to cost, in nats; ``what`` names the loss."""

    expected: Interval
    measured: Interval
    what: str

    @property
    def ratio(self) -> float | None:
        """Expected over measured."""
        return self.expected.mean / self.measured.mean if self.measured.mean > 0 else None


def write_report(runs: Sequence[str | Path], out: str | Path, benches: Sequence[str | Path] = ()) -> None:
    """Write one HTML file about one or several runs that needs no other file and no network; an earlier file is replaced.

    ``benches`` are measurements of other devices: run folders, copied ``record.json`` files, or what ``hesper bench --json`` printed.

    Raises:
        UsageError: no run, a run that is missing, damaged or changed, no bench, or a place that cannot be written.
        JobError: the disk is full.
    """
    target = Path(out)
    if target.is_dir():
        raise UsageError(f"{out} is a folder; give --out the name of a file, such as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist; make it, or give --out another place")
    page = render(collect(runs), [bench_file(where) for where in benches])
    try:
        # A file name that is no Unicode was recorded with lone surrogates, which UTF-8 cannot hold.
        write_bytes(target, page.encode("utf-8", "replace"))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise JobError(f"the disk is full, so {out} was not written; free some space and try again") from error
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{out} cannot be written ({reason}); give --out a place that can be") from error


def render(runs: Sequence[RunFacts], elsewhere: Sequence[BenchFacts] = ()) -> str:
    """The page as text; ``elsewhere`` are benches of other devices."""
    environment = Environment(
        loader=FunctionLoader(_shipped), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.finalize = lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else figures.printable(value)
    for name in ("change", "percent", "plus_minus", "shape", "significant", "spread", "whole"):
        environment.filters[name] = getattr(figures, name)
    views = [_view(facts, index) for index, facts in enumerate(runs)]
    template = environment.get_template("template.html.j2")
    fronts = [(name, Markup(drawing)) for name, drawing in fronts_of(runs)]
    measured = [bench for facts in runs for bench in facts.benches[-1:]] + list(elsewhere)
    style = Markup(_shipped("style.css"))  # ours, not input
    return template.render(
        runs=views, style=style, joint=_joint(runs), fronts=fronts, benches=measured if elsewhere or len(runs) > 1 else []
    )


def _shipped(name: str) -> str:
    return resources.files("hesper.report").joinpath(name).read_text(encoding="utf-8")


def _view(facts: RunFacts, index: int) -> dict[str, Any]:
    """What the template needs of one run."""
    plan = facts.plan
    return {
        "id": f"run{index}",
        "series": index % 6,
        "facts": facts,
        "asked": _budget(plan.budget),
        "adaptive": any(cut.threshold is not None for cut in plan.tokens),
        "blocks": _block_rows(facts),
        "heads_removed": sum(len(cut.remove) for cut in plan.heads),
        "command": command(facts),
        "entries": [{"entry": entry, "asked": _flat(entry.asked), "results": _flat(entry.results)} for entry in facts.entries],
        "skipped": facts.skipped[:MOST_SKIPPED],
        "exhibits": [_exhibit(exhibit, facts.classes) for exhibit in _exhibits(facts, f"picture{index}")],
        "pricing": _pricing(facts),
        "bench": facts.benches[-1] if facts.benches else None,
        **{name: None if drawing is None else Markup(drawing) for name, drawing in _drawings(facts).items()},
        "maps": [Markup(drawing) for drawing in _patch_maps(facts)],
    }


def _drawings(facts: RunFacts) -> dict[str, str | None]:
    """The charts of one run, each None where the record lacks its figures."""
    main, series, limit = facts.main, _series(facts), (facts.plan.budget.kind, facts.plan.budget.value)
    tokens, images, pricing = main and main.tokens, main and main.per_image, _pricing(facts)
    removed = {(cut.block, head) for cut in facts.plan.heads for head in cut.remove}
    head_scale, token_scale = _scale(facts.heads.price if facts.heads else None), _scale(facts.token_prices)
    drawn, bench = bool(series.points or series.chosen), facts.benches[-1] if facts.benches else None
    return {
        "tokens_chart": charts.tokens_chart(tokens.mean, tokens.low, tokens.high, facts.plan.model.anatomy.tokens) if tokens else None,
        "head_map": charts.head_map(facts.heads.price, facts.heads.stderr, removed, head_scale) if facts.heads and head_scale else None,
        "head_legend": charts.colour_bar(head_scale, "price of a head, nats per cut") if head_scale else None,
        "token_legend": charts.colour_bar(token_scale, "price of a patch, nats per cut") if token_scale else None,
        "drift_chart": charts.drift_chart([series], limit) if drawn else None,
        "agreement_chart": charts.agreement_chart([series], limit) if drawn else None,
        "histogram": charts.histogram(images.kept, sum(images.kept) / len(images.kept)) if images else None,
        "scatter": charts.scatter(images.kept, images.drift, images.agreement) if images else None,
        "pricing_chart": charts.interval_chart([pricing.expected, pricing.measured], f"{pricing.what}, nats") if pricing else None,
        "speedup_chart": speedup_chart(bench.rows) if bench and any(row.speedup for row in bench.rows) else None,
        "router_chart": charts.bar_chart(facts.explained, "explained variance, share", "Explained variance of the routers")
        if facts.explained
        else None,
    }


def _patch_maps(facts: RunFacts) -> list[str]:
    scale, grid = _scale(facts.token_prices), facts.plan.model.anatomy.grid
    if scale is None or facts.token_prices is None:
        return []
    return [
        charts.patch_map(
            row, grid, scale, f"Price of each patch in block {block}, on average {figures.significant(sum(row) / len(row))} nats"
        )
        for block, row in enumerate(facts.token_prices)
    ]


def _scale(rows: Sequence[Sequence[float]] | None) -> Colours | None:
    return colours(value for row in rows or () for value in row)


def _series(facts: RunFacts) -> Series:
    chosen = [Chosen(o.figures["macs_ratio"], o.figures["drift_kl"], o.figures["agreement"], _where(o)) for o in facts.outcomes]
    return Series(facts.name, facts.plan.points, tuple(chosen))


def _where(outcome: Outcome) -> str:
    return f"{outcome.n} {'images' if outcome.kind == 'eval' else ''} {'of ' if outcome.kind == 'eval' else ''}{outcome.data}".replace(
        "  ", " "
    )


def _joint(runs: Sequence[RunFacts]) -> dict[str, Markup] | None:
    """The charts several runs share."""
    series = [_series(facts) for facts in runs]
    if len(runs) < 2 or not any(run.points or run.chosen for run in series):
        return None
    return {"drift": Markup(charts.drift_chart(series)), "agreement": Markup(charts.agreement_chart(series))}


def _pricing(facts: RunFacts) -> Pricing | None:
    """Expected and measured loss, of the same kind: drift from the dense model, or for prices from labels the rise in cross-entropy."""
    expected, decided = facts.plan.expected_loss, next((o for o in facts.outcomes if o.kind != "eval"), None)
    if expected is None or decided is None:
        return None
    measured, stderr, what = decided.figures["drift_kl"], decided.figures.get("drift_kl_stderr"), "drift from the dense model"
    if facts.plan.pricing is not None and facts.plan.pricing.criterion == "ce":
        if not decided.figures.keys() >= {"loss", "dense_loss"}:
            return None
        measured, stderr, what = decided.figures["loss"] - decided.figures["dense_loss"], None, "rise in cross-entropy"
    ahead = Interval(f"expected (second order, {expected.n} fitting images)", expected.mean, expected.stderr)
    return Pricing(ahead, Interval(f"measured ({decided.n} verification images)", measured, stderr), what)


def _exhibits(facts: RunFacts, prefix: str) -> tuple[Exhibit, ...]:
    if facts.gallery is None:
        return ()
    return exhibits(facts.gallery, facts.plan.model.anatomy, facts.plan.skip_unread, prefix)


def _exhibit(exhibit: Exhibit, classes: Sequence[str]) -> dict[str, Any]:
    def name(label: int) -> str:
        return classes[label] if 0 <= label < len(classes) else f"class {label}"

    stages = [{"stage": stage, "svg": Markup(stage.svg)} for stage in exhibit.stages]
    names = {"dense": name(exhibit.dense), "cut": name(exhibit.cut), "same": exhibit.dense == exhibit.cut}
    return {"exhibit": exhibit, "picture": Markup(exhibit.picture), "stages": stages, **names}


def _block_rows(facts: RunFacts) -> list[BlockRow]:
    tokens = facts.main.tokens if facts.main else None
    cuts = {cut.block: cut for cut in facts.plan.tokens}
    heads, gates = {cut.block: cut for cut in facts.plan.heads}, {gate.block: gate for gate in facts.plan.gates}
    return [
        BlockRow(
            block,
            (tokens.mean[block], tokens.low[block], tokens.high[block]) if tokens else None,
            _cut(cuts.get(block)),
            _heads(heads.get(block), gates.get(block), facts.plan.model.anatomy.heads),
            facts.explained[block] if facts.explained and block in cuts else None,
        )
        for block in range(facts.plan.model.anatomy.depth)
    ]


def _cut(cut: TokenCut | None) -> str:
    if cut is None:
        return ""
    return f"{cut.combine} {cut.remove}" if cut.threshold is None else f"{cut.combine} below {figures.significant(cut.threshold)} nats"


def _heads(cut: HeadCut | None, gate: HeadGate | None, heads: int) -> str:
    removed = [] if cut is None else [f"{', '.join(map(str, cut.remove))} of {heads}"]
    return "; ".join(removed if gate is None else [*removed, f"up to {figures.significant(gate.threshold)} nats sit out"])


def _budget(budget: Budget) -> str:
    limit = {
        "macs": f"keep at most {figures.percent(budget.value)} of the MACs",
        "loss": f"drift at most {figures.significant(budget.value)} nats",
        "disagreement": f"change at most {figures.percent(budget.value)} of the top-1 decisions",
        "latency": f"take {figures.percent(budget.value)} of the dense model’s time on the device",
        "latency_ms": f"take {figures.significant(budget.value)} ms on the device",
        "energy": f"take {figures.percent(budget.value)} of the dense model’s energy on the device",
    }[budget.kind]
    return f"{limit}, with confidence {budget.confidence:g}"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and text of every value, however deep; long lists by their length, for the record has them."""
    return list(_flatten(values, ""))


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and (len(value) > LONG or any(isinstance(item, (list, Mapping)) for item in value)):
        yield path, f"{len(value)} values, see record.json"
    elif isinstance(value, list):
        yield path, ", ".join("–" if item is None else str(item) for item in value) or "none"
    else:
        yield path, "–" if value is None else str(value)
