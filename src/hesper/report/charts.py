"""Charts: numbers in, SVG text out. Every mark tells its figures while the pointer rests on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hesper.plan import OperatingPoint
from hesper.report.figures import percent, plus_minus, significant
from hesper.report.svg import Axis, Colours, cell_path, chart, element, frame, label, linear, logarithmic, shade, short, tip

__all__ = [
    "Chosen", "Interval", "Series", "agreement_chart", "bar_chart", "colour_bar", "drift_chart",
    "head_map", "histogram", "interval_chart", "patch_map", "scatter", "tokens_chart",
]  # fmt: skip

# Every chart is drawn for a column of a phone, so that its text keeps its size there; wide pages put two side by side.
WIDTH, HEIGHT = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 16.0, 44.0
MANY_LABELS = 16
LEVELS = 64
MOST_NAMED = 6  # labels along a colour scale; more run into each other


@dataclass(frozen=True)
class Chosen:
    """A measurement to mark among operating points: kept share of MACs, drift in nats, agreement, and what it was measured on."""

    macs: float
    drift: float
    agreement: float
    what: str


@dataclass(frozen=True)
class Series:
    """The operating points of one run, and the measurements to mark."""

    name: str
    points: tuple[OperatingPoint, ...]
    chosen: tuple[Chosen, ...]


@dataclass(frozen=True)
class Interval:
    """A mean with its standard error (None: unknown), in nats."""

    name: str
    mean: float
    stderr: float | None


def tokens_chart(mean: Sequence[float], low: Sequence[float], high: Sequence[float], dense: int) -> str:
    """Tokens left after each block: mean over images, range from the fewest to the most, and the dense model's number."""
    x, y = _blocks(len(mean)), linear([0, dense, *high], HEIGHT - BOTTOM, TOP, zero=True)
    half = min((x.end - x.start) / len(mean) * 0.32, 14)
    body = frame(x, y, "block", "tokens left", _names(len(mean)), x_grid=False)
    body.append(element("line", tip(f"dense model: {dense} tokens"), x1=x.start, x2=x.end, y1=y.at(dense), y2=y.at(dense), class_="dense"))
    body.append(label(x.end, y.at(dense) - 5, "dense", "end", "dim"))
    for block, (middle, least, most) in enumerate(zip(mean, low, high, strict=True)):
        text = tip(f"block {block}: {significant(middle, 4)} tokens on average, {least:g} to {most:g}")
        top, bottom = y.at(most), y.at(least)
        body.append(
            element("rect", text, x=x.at(block) - half, y=top - 1, width=2 * half, height=bottom - top + 2, rx=2, class_="range s0")
        )
        place = y.at(middle)
        body.append(element("line", text, x1=x.at(block) - half, x2=x.at(block) + half, y1=place, y2=place, class_="mean s0"))
    return chart("Tokens left after each block", WIDTH, HEIGHT, body)


def head_map(
    values: Sequence[Sequence[float]], stderr: Sequence[Sequence[float]], removed: Collection[tuple[int, int]], scale: Colours
) -> str:
    """Price of every head, blocks along x and heads along y; crosses on those that were removed."""
    depth, heads = len(values), max(len(row) for row in values)
    x = _blocks(depth)
    wide = (x.end - x.start) / depth
    tall = min(wide, 340 / heads)
    height = TOP + tall * heads + BOTTOM
    step = max(1, math.ceil(heads / MANY_LABELS))
    body = [label(x.start - 7, TOP + tall * (head + 0.5) + 4, str(head), "end", "dim") for head in range(0, heads, step)]
    names = _names(depth)
    body += [label(x.at(tick), TOP + tall * heads + 17, names[tick], "middle", "dim") for tick in x.ticks]
    body.append(label((x.start + x.end) / 2, height - 7, "block", "middle"))
    body.append(label(12, TOP + tall * heads / 2, "head", "middle", turn=True))
    for block, row in enumerate(values):
        for head, price in enumerate(row):
            error = stderr[block][head] if block < len(stderr) and head < len(stderr[block]) else None
            out = (block, head) in removed
            text = tip(f"block {block}, head {head}: {plus_minus(price, error)} nats{', removed' if out else ''}")
            left, top = x.at(block) - wide / 2, TOP + tall * head
            body.append(
                element("rect", text, x=left + 0.75, y=top + 0.75, width=wide - 1.5, height=tall - 1.5, rx=1.5, fill=scale.of(price))
            )
            if out:
                body.append(_cross(x.at(block), top + tall / 2, min(wide, tall) * 0.24))
    return chart("Price of removing each head, by block", WIDTH, height, body)


def colour_bar(scale: Colours, unit: str) -> str:
    """The legend of a colour scale, with ticks in ``unit``."""
    axis = logarithmic([scale.low, scale.high], LEFT, WIDTH - RIGHT)
    ticks = [tick for tick in axis.ticks if scale.low <= tick <= scale.high]
    if len(ticks) > MOST_NAMED:
        ticks = [tick for tick in ticks if math.log10(tick).is_integer()]
    axis = Axis(scale.low, scale.high, axis.start, axis.end, tuple(ticks), log=True)
    wide = (axis.end - axis.start) / LEVELS
    body = [
        element("rect", x=axis.start + wide * level, y=4.0, width=wide + 0.3, height=10.0, fill=shade((level + 0.5) / LEVELS))
        for level in range(LEVELS)
    ]
    body += [label(axis.at(tick), 29, short(tick), "middle", "dim") for tick in axis.ticks or (scale.low, scale.high)]
    body.append(label((axis.start + axis.end) / 2, 47, unit, "middle"))
    return chart(f"Colour scale, {unit}", WIDTH, 52, body)


def patch_map(values: Sequence[float], grid: tuple[int, int], scale: Colours, name: str) -> str:
    """Price of every patch of one block, laid out as the image is."""
    levels: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        levels.setdefault(scale.level(value, LEVELS), []).append(place)
    body = []
    for level, places in sorted(levels.items()):
        least, most = min(values[place] for place in places), max(values[place] for place in places)
        text = tip(f"{significant(least)} to {significant(most)} nats" if most > least else f"{significant(least)} nats")
        body.append(element("path", text, d=cell_path(places, grid[1]), fill=shade((level + 0.5) / LEVELS)))
    return chart(name, grid[1], grid[0], body, "patches")


def drift_chart(runs: Sequence[Series], limit: tuple[str, float] | None = None) -> str:
    """Drift, on a logarithmic axis, against kept MACs; ``limit`` is a line at a kept share ("macs") or a drift ("loss")."""
    every = [point.drift_kl for run in runs for point in run.points] + [chosen.drift for run in runs for chosen in run.chosen]
    if limit and limit[0] == "loss":
        every.append(limit[1])
    y = logarithmic(every, HEIGHT - BOTTOM, TOP)
    x = _shares(runs, limit)
    body = frame(x, y, "kept MACs, share of dense", "drift, nats", _percents(x))
    body += _limit_line(x, y, limit, "loss")
    for index, run in enumerate(runs):
        seen = [(point.macs, point.drift_kl, _point_text(point)) for point in run.points]
        marked = [(chosen.macs, chosen.drift, chosen) for chosen in run.chosen]
        body += _best_line(x, y, [(macs, drift) for macs, drift, _ in seen], index)
        body += _dots(x, y, seen, index, run.name if len(runs) > 1 else "")
        body += _marks(x, y, marked, index, run.name if len(runs) > 1 else "")
    return chart("Drift from the dense model against kept MACs", WIDTH, HEIGHT, body)


def agreement_chart(runs: Sequence[Series], limit: tuple[str, float] | None = None) -> str:
    """Share of images classified as the dense model does, against kept MACs; ``limit`` as for drift, or ("disagreement", share)."""
    every = [point.agreement for run in runs for point in run.points] + [chosen.agreement for run in runs for chosen in run.chosen]
    level = ("disagreement", 1 - limit[1]) if limit and limit[0] == "disagreement" else limit
    if level and level[0] == "disagreement":
        every.append(level[1])
    y = linear([*every, 1.0], HEIGHT - BOTTOM, TOP, most=1.0)
    x = _shares(runs, limit)
    body = frame(x, y, "kept MACs, share of dense", "agreement with dense", _percents(x))
    body += _limit_line(x, y, level, "disagreement")
    for index, run in enumerate(runs):
        name = run.name if len(runs) > 1 else ""
        body += _dots(x, y, [(point.macs, point.agreement, _point_text(point)) for point in run.points], index, name)
        body += _marks(x, y, [(chosen.macs, chosen.agreement, chosen) for chosen in run.chosen], index, name)
    return chart("Agreement with the dense model against kept MACs", WIDTH, HEIGHT, body)


def histogram(shares: Sequence[float], mean: float) -> str:
    """How many images keep which share of the MACs, with a line at the mean."""
    x = linear(shares, LEFT, WIDTH - RIGHT, ticks=6)
    bins = max(8, min(30, round(math.sqrt(len(shares)) * 1.5)))
    counts = [0] * bins
    for share in shares:
        counts[min(int((share - x.low) / (x.high - x.low) * bins), bins - 1)] += 1
    most = max(counts)
    y = linear([0, most], HEIGHT - BOTTOM, TOP + 14, zero=True, ticks=min(5, most))
    body = frame(x, y, "kept MACs, share of dense", "images", _percents(x), x_grid=False)
    wide = (x.end - x.start) / bins
    for index, count in enumerate(counts):
        if count:
            low, high = (x.low + (x.high - x.low) * (index + end) / bins for end in (0, 1))
            text = tip(f"{count} image{'s' if count > 1 else ''} at {percent(low)} to {percent(high)}")
            top = y.at(count)
            body.append(
                element("rect", text, x=x.start + wide * index + 0.75, y=top, width=wide - 1.5, height=y.start - top, class_="bar s0")
            )
    body.append(element("line", x1=x.at(mean), x2=x.at(mean), y1=y.start, y2=TOP, class_="limit"))
    body.append(label(x.at(mean), TOP - 4, f"mean {percent(mean)}", _side(x, mean), "warm"))
    return chart("Kept MACs per image", WIDTH, HEIGHT, body)


def scatter(shares: Sequence[float], drifts: Sequence[float], agree: Sequence[float]) -> str:
    """Drift against kept MACs, a dot per image; images with another top-1 class than the dense model's are diamonds."""
    x, floor = linear(shares, LEFT, WIDTH - RIGHT, ticks=6), max(drifts, default=1.0) / 1e6
    y = logarithmic([max(drift, floor) for drift in drifts], HEIGHT - BOTTOM, TOP)
    body = frame(x, y, "kept MACs, share of dense", "drift, nats", _percents(x))
    for share, drift, same in sorted(zip(shares, drifts, agree, strict=True), key=lambda image: -image[2]):
        text = tip(f"{significant(drift)} nats at {percent(share)}{'' if same else ', another top-1 class'}")
        px, py = x.at(share), y.at(max(drift, floor))
        body.append(element("circle", text, cx=px, cy=py, r=3, class_="dot s0") if same else _diamond(px, py, 5.0, text, "changed"))
    return chart("Drift against kept MACs, image by image", WIDTH, HEIGHT, body)


def interval_chart(rows: Sequence[Interval], x_label: str) -> str:
    """Means with two standard errors either way, one row each, on an axis that starts at 0."""
    ends = [row.mean + 2 * sign * (row.stderr or 0) for row in rows for sign in (-1, 1)]
    height = TOP + 46 * len(rows) + BOTTOM
    x, y = linear(ends, LEFT, WIDTH - RIGHT, zero=True), Axis(0, len(rows), height - BOTTOM, TOP, ())
    body = frame(x, y, x_label, "")
    for index, row in enumerate(rows):
        place, text = TOP + 46 * index + 32, tip(f"{row.name}: {plus_minus(row.mean, row.stderr)} nats")
        if row.stderr:
            left, right = x.at(row.mean - 2 * row.stderr), x.at(row.mean + 2 * row.stderr)
            body.append(element("line", text, x1=left, x2=right, y1=place, y2=place, class_="whisker s0"))
        body.append(element("circle", text, cx=x.at(row.mean), cy=place, r=5, class_="point s0"))
        body.append(label(x.start + 4, place - 14, row.name))
    return chart("Expected and measured loss", WIDTH, height, body)


def bar_chart(values: Sequence[float], y_label: str, what: str) -> str:
    """A bar per block."""
    x, y = _blocks(len(values)), linear([0, 1, *values], HEIGHT - BOTTOM, TOP, zero=True)
    half = min((x.end - x.start) / len(values) * 0.32, 14)
    body = frame(x, y, "block", y_label, _names(len(values)), x_grid=False)
    for block, value in enumerate(values):
        top, bottom = sorted((y.at(value), y.at(0.0)))
        text = tip(f"block {block}: {significant(value)}")
        body.append(element("rect", text, x=x.at(block) - half, y=top, width=2 * half, height=max(bottom - top, 0.5), class_="bar s0"))
    return chart(what, WIDTH, HEIGHT, body)


def _blocks(depth: int) -> Axis:
    half = (WIDTH - RIGHT - LEFT) / depth / 2
    step = max(1, math.ceil(depth / MANY_LABELS))
    # Ticks stand in the middle of their columns, so the axis runs from half a column before block 0 to half a column after the last.
    return Axis(-0.5, depth - 0.5, LEFT, LEFT + 2 * half * depth, tuple(float(block) for block in range(0, depth, step)))


def _names(depth: int) -> dict[float, str]:
    return {float(block): str(block) for block in range(depth)}


def _percents(axis: Axis) -> dict[float, str]:
    fine = any(abs(tick * 100 - round(tick * 100)) > 1e-6 for tick in axis.ticks)
    return {tick: percent(tick, 1 if fine else 0) for tick in axis.ticks}


def _shares(runs: Sequence[Series], limit: tuple[str, float] | None) -> Axis:
    every = [point.macs for run in runs for point in run.points] + [chosen.macs for run in runs for chosen in run.chosen]
    return linear(every + ([limit[1]] if limit and limit[0] == "macs" else []), LEFT, WIDTH - RIGHT)


def _limit_line(x: Axis, y: Axis, limit: tuple[str, float] | None, across: str) -> list[str]:
    if limit is None or limit[0] not in ("macs", across):
        return []
    if limit[0] == "macs":
        place = x.at(limit[1])
        return [
            element("line", tip(f"budget: {percent(limit[1])}"), x1=place, x2=place, y1=y.start, y2=y.end, class_="limit"),
            label(place + (5 if place < (x.start + x.end) / 2 else -5), y.end + 9, "budget", _side(x, limit[1]), "warm"),
        ]
    place = y.at(limit[1])
    line = element("line", tip(f"budget: {significant(limit[1])}"), x1=x.start, x2=x.end, y1=place, y2=place, class_="limit")
    return [line, label(x.end, place - 5, "budget", "end", "warm")]


def _side(axis: Axis, value: float) -> str:
    return "start" if axis.at(value) < (axis.start + axis.end) / 2 else "end"


def _best_line(x: Axis, y: Axis, points: Sequence[tuple[float, float]], index: int) -> list[str]:
    """Through the points that no other beats on both axes."""
    best: list[tuple[float, float]] = []
    for macs, drift in sorted(points):
        if not best or drift < best[-1][1]:
            best.append((macs, drift))
    if len(best) < 2:
        return []
    path = "M" + "L".join(f"{x.at(macs):.1f} {y.at(drift):.1f}" for macs, drift in best)
    return [element("path", d=path, class_=f"best s{index % 6}")]


def _dots(x: Axis, y: Axis, points: Sequence[tuple[float, float, str]], index: int, name: str) -> list[str]:
    lead = f"{name}: " if name else ""
    return [
        element("circle", tip(lead + text), cx=x.at(macs), cy=y.at(value), r=3.2, class_=f"dot s{index % 6}")
        for macs, value, text in points
    ]


def _marks(x: Axis, y: Axis, marked: Sequence[tuple[float, float, Chosen]], index: int, name: str) -> list[str]:
    """The chosen plan's measurements: a ring for the first (what the budget was decided on), diamonds for later evaluations."""
    out = []
    for order, (macs, value, chosen) in enumerate(marked):
        lead = f"{name}, " if name else ""
        figures = f"{percent(chosen.macs)} of the MACs, {significant(chosen.drift)} nats, {percent(chosen.agreement)} agreement"
        text, px, py = tip(f"{lead}{chosen.what}: {figures}"), x.at(macs), y.at(value)
        if order:
            out.append(_diamond(px, py, 6.0, text, f"later s{index % 6}"))
        else:
            out.append(element("circle", text, cx=px, cy=py, r=7, class_=f"ring s{index % 6}"))
    return out


def _point_text(point: OperatingPoint) -> str:
    figures = f"{percent(point.macs)} of the MACs, {significant(point.drift_kl)} nats, {percent(point.agreement)} agreement"
    return f"{figures} (dial {significant(point.dial)}, {point.n} images)"


def _diamond(x: float, y: float, half: float, text: str, class_: str) -> str:
    path = f"M{x:.1f} {y - half:.1f}l{half} {half}l-{half} {half}l-{half} -{half}z"
    return element("path", text, d=path, class_=class_)


def _cross(x: float, y: float, half: float) -> str:
    path = f"M{x - half:.1f} {y - half:.1f}l{2 * half:.1f} {2 * half:.1f}m0 -{2 * half:.1f}l-{2 * half:.1f} {2 * half:.1f}"
    return element("path", d=path, class_="cross under") + element("path", d=path, class_="cross")
