"""The picture of what tokens and heads are worth, alone and together, and schedules and counts, from the book that ablation.py fills.

    python benchmarks/figure.py --book benchmarks/results/ablation.jsonl --out docs/pictures/heads.svg

Drift against kept MACs on the validation images, one column a model; bars are one standard error either way.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from common import MODELS, Book

from hesper.report.figures import percent, plus_minus
from hesper.report.svg import chart, element, frame, label, linear, logarithmic, tip

PANEL, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 330.0, 330.0, 58.0, 34.0, 76.0, 20.0


@dataclass(frozen=True)
class Curve:
    """A row of the book, what the picture calls it, and its colour; larger points of curves drawn before show behind smaller ones."""

    row: str
    name: str
    colour: str
    radius: float = 4.0


HEADS = (
    Curve("heads alone static", "static heads alone", "s1"),
    Curve("heads alone adaptive", "adaptive heads alone", "s4"),
    Curve("tokens alone", "tokens alone", "s0", 7.5),
    Curve("tokens and heads static", "tokens and static heads", "s2", 5.0),
    Curve("tokens and heads adaptive", "tokens and adaptive heads", "s3", 2.5),
)
SCHEDULES = (
    Curve("fixed symmetric", "symmetric, fixed counts", "s1"),
    Curve("symmetric", "symmetric, adaptive counts", "s4"),
    Curve("fixed", "asymmetric, fixed counts", "s2"),
    Curve("base", "asymmetric, adaptive counts", "s0"),
    Curve("refit and refined", "the same, refitted and refined", "s3"),
)


def points(book: Book, key: str, row: str) -> list[dict[str, float]]:
    """The targets that a row reached, from few MACs to many."""
    found = [own for name, own in book.rows.items() if name.startswith(f"{key} | {row} | ")]
    return sorted(found, key=lambda own: own["macs_ratio"])


def panel(book: Book, key: str, name: str, curves: tuple[Curve, ...]) -> str:
    """One model's curves."""
    every = [own for curve in curves for own in points(book, key, curve.row)]
    x = linear([own["macs_ratio"] for own in every], LEFT, PANEL - 24)
    y = logarithmic([own["drift_kl"] for own in every], HEIGHT - BOTTOM, TOP)
    body = frame(x, y, "kept MACs, share of dense", "drift, nats", {tick: percent(tick) for tick in x.ticks})
    body.append(label(x.start, TOP - 14, name))
    for curve in curves:
        own = points(book, key, curve.row)
        path = "M" + "L".join(f"{x.at(at['macs_ratio']):.1f} {y.at(at['drift_kl']):.1f}" for at in own)
        body += [element("path", d=path, class_=f"best {curve.colour}")] if len(own) > 1 else []
        for at in own:
            place, drift, error = x.at(at["macs_ratio"]), at["drift_kl"], at["drift_kl_stderr"]
            text = tip(f"{curve.name}: {percent(at['macs_ratio'])} of the MACs, {plus_minus(drift, error)} nats")
            ends = y.at(drift - error), y.at(drift + error)
            body.append(element("line", text, x1=place, x2=place, y1=ends[0], y2=ends[1], class_=f"whisker {curve.colour}"))
            body.append(element("circle", text, cx=place, cy=y.at(drift), r=curve.radius, class_=f"point {curve.colour}"))
    return "".join(body)


def legend(curves: tuple[Curve, ...]) -> str:
    """The curves' names in their colours, below both panels."""
    body, column = [], 2 * PANEL / 3
    for index, curve in enumerate(curves):
        left, top = 16 + column * (index % 3), HEIGHT - 24 + LEGEND * (index // 3)
        body += [element("circle", cx=left, cy=top - 4, r=4.0, class_=f"point {curve.colour}"), label(left + 10, top, curve.name)]
    return "".join(body)


def strip(book: Book, curves: tuple[Curve, ...]) -> str:
    """Both models side by side, and the legend."""
    body = [legend(curves)]
    for index, (key, (name, _)) in enumerate(MODELS.items()):
        body.append(element("g", panel(book, key, name.split(".")[0], curves), transform=f"translate({index * PANEL:g} 0)"))
    return "".join(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    book = Book(options.book)
    rows = [curve.row for curve in (*HEADS, *SCHEDULES)]
    if missing := [f"{key} | {row}" for key in MODELS for row in rows if not points(book, key, row)]:
        raise SystemExit(f"{options.book} has nothing on {missing[0]!r}; run ablation.py first.")
    high = HEIGHT + LEGEND
    style = element("style", (files("hesper.report") / "style.css").read_text() + "svg { font-family: system-ui, sans-serif; }")
    paper = element("rect", width=2 * PANEL, height=2 * high, fill="var(--paper)")
    strips = [
        element("g", strip(book, curves), transform=f"translate(0 {index * high:g})") for index, curves in enumerate((HEADS, SCHEDULES))
    ]
    words = "Drift of tokens and heads, alone and together, and of schedules and counts"
    options.out.write_text(chart(words, 2 * PANEL, 2 * high, [style, paper, *strips]) + "\n")


if __name__ == "__main__":
    main()
