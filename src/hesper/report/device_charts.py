"""Charts of devices: how many times as fast, and what a better answer costs in time, energy or multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hesper.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from hesper.report.devices import BenchRow
from hesper.report.figures import percent, significant
from hesper.report.svg import Axis, chart, element, frame, label, linear, tip

__all__ = ["Candidate", "pareto_chart", "pareto_front", "speedup_chart"]

ROW = 46


@dataclass(frozen=True)
class Candidate:
    """A model to choose: its cost, lower being better, and how good it is, higher being better; ``dense`` ones are drawn apart."""

    name: str
    cost: float
    quality: float
    details: str
    dense: bool = False


def speedup_chart(rows: Sequence[BenchRow]) -> str:
    """How many times as fast a run is as its baseline, with its interval, and a tick where the ratio of MACs promises it, row by row."""
    shown = [row for row in rows if row.speedup is not None]
    ends = [1.0, *(value for row in shown for value in (*(row.speedup or ()), row.promise or 1.0))]
    height = TOP + ROW * len(shown) + BOTTOM
    x, y = linear(ends, LEFT, WIDTH - RIGHT, zero=True), Axis(0, len(shown), height - BOTTOM, TOP, ())
    body = frame(x, y, "times as fast as the baseline", "")
    body.append(element("line", tip("as fast as the baseline"), x1=x.at(1), x2=x.at(1), y1=y.start, y2=y.end, class_="dense"))
    for index, row in enumerate(shown):
        ratio, low, high = row.speedup or (1.0, 1.0, 1.0)
        place, name = TOP + ROW * index + 32, f"{row.batch_size} image{'s' if row.batch_size > 1 else ''} at a time"
        words = f"{name}: {significant(ratio)} times as fast, {significant(low)} to {significant(high)}"
        if row.promise is not None:
            words += f"; MACs promise {significant(row.promise)}"
            at = x.at(row.promise)
            body.append(element("line", tip(words), x1=at, x2=at, y1=place - 9, y2=place + 9, class_="limit"))
        body.append(element("line", tip(words), x1=x.at(low), x2=x.at(high), y1=place, y2=place, class_="whisker s0"))
        body.append(element("circle", tip(words), cx=x.at(ratio), cy=place, r=5, class_="point s0"))
        body.append(label(x.start + 4, place - 14, name))
    return chart("Speed-up by batch size", WIDTH, height, body)


def pareto_front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in cost and quality at once, the cheapest first.

    >>> [own.name for own in pareto_front([Candidate("a", 2, 0.9, ""), Candidate("b", 1, 0.8, ""), Candidate("c", 3, 0.7, "")])]
    ['b', 'a']
    """
    front: list[Candidate] = []
    for own in sorted(candidates, key=lambda each: (each.cost, -each.quality)):
        if not front or own.quality > front[-1].quality or (own.cost, own.quality) == (front[-1].cost, front[-1].quality):
            front.append(own)
    return tuple(front)


def pareto_chart(candidates: Sequence[Candidate], cost: str, quality: str) -> str:
    """Quality, a share, against cost; a line through those that nothing beats, rings for dense models."""
    x = linear([own.cost for own in candidates], LEFT, WIDTH - RIGHT, zero=True)
    y = linear([own.quality for own in candidates], HEIGHT - BOTTOM, TOP, most=1.0)
    body = frame(x, y, cost, quality)
    front = pareto_front(candidates)
    if len(front) > 1:
        path = "M" + "L".join(f"{x.at(own.cost):.1f} {y.at(own.quality):.1f}" for own in front)
        body.append(element("path", d=path, class_="best s0"))
    runs = [own for own in candidates if not own.dense]
    for own in candidates:
        words = tip(
            f"{own.name}: {own.details}; {quality} {percent(own.quality)}{'' if own in front else '; another is at least as good in both'}"
        )
        colour = "s0" if own.dense else f"s{runs.index(own) % 6}"
        kind = "ring" if own.dense else "point"
        body.append(element("circle", words, cx=x.at(own.cost), cy=y.at(own.quality), r=7 if own.dense else 5, class_=f"{kind} {colour}"))
    return chart(f"{quality} against {cost}", WIDTH, HEIGHT, body)
