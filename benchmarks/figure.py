"""The picture of what tokens and heads are worth, alone and together, from the book that ablation.py fills.

    python benchmarks/figure.py --book benchmarks/results/ablation.jsonl --out docs/pictures/heads.svg

Drift against kept MACs on the validation images, one panel a model; bars are one standard error either way.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from common import MODELS, Book

from hesper.report.figures import percent, plus_minus
from hesper.report.svg import chart, element, frame, label, linear, logarithmic, tip

ROWS = (
    ("tokens alone", "s0"),
    ("heads alone static", "s1"),
    ("heads alone adaptive", "s4"),
    ("tokens and heads static", "s2"),
    ("tokens and heads adaptive", "s3"),
)
PANEL, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 330.0, 330.0, 58.0, 34.0, 76.0, 20.0


def points(book: Book, key: str, row: str) -> list[dict[str, float]]:
    """The targets that a row reached, from few MACs to many."""
    found = [own for name, own in book.rows.items() if name.startswith(f"{key} | {row} | ")]
    return sorted(found, key=lambda own: own["macs_ratio"])


def panel(book: Book, key: str, name: str, shift: float) -> str:
    """One model's curves, moved ``shift`` pixels to the right."""
    every = [own for row, _ in ROWS for own in points(book, key, row)]
    x = linear([own["macs_ratio"] for own in every], LEFT, PANEL - 24)
    y = logarithmic([own["drift_kl"] for own in every], HEIGHT - BOTTOM, TOP)
    body = frame(x, y, "kept MACs, share of dense", "drift, nats", {tick: percent(tick) for tick in x.ticks})
    body.append(label(x.start, TOP - 14, name))
    for row, colour in ROWS:
        own = points(book, key, row)
        path = "M" + "L".join(f"{x.at(at['macs_ratio']):.1f} {y.at(at['drift_kl']):.1f}" for at in own)
        body += [element("path", d=path, class_=f"best {colour}")] if len(own) > 1 else []
        for at in own:
            place, drift, error = x.at(at["macs_ratio"]), at["drift_kl"], at["drift_kl_stderr"]
            text = tip(f"{row}: {percent(at['macs_ratio'])} of the MACs, {plus_minus(drift, error)} nats")
            ends = y.at(drift - error), y.at(drift + error)
            body.append(element("line", text, x1=place, x2=place, y1=ends[0], y2=ends[1], class_=f"whisker {colour}"))
            body.append(element("circle", text, cx=place, cy=y.at(drift), r=4.0, class_=f"point {colour}"))
    return element("g", "".join(body), transform=f"translate({shift:g} 0)")


def legend() -> str:
    """The rows' names in their colours, below both panels."""
    body, column = [], 2 * PANEL / 3
    for index, (row, colour) in enumerate(ROWS):
        left, top = 16 + column * (index % 3), HEIGHT - 24 + LEGEND * (index // 3)
        body += [element("circle", cx=left, cy=top - 4, r=4.0, class_=f"point {colour}"), label(left + 10, top, row)]
    return "".join(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    book = Book(options.book)
    if missing := [f"{key} | {row}" for key in MODELS for row, _ in ROWS if not points(book, key, row)]:
        raise SystemExit(f"{options.book} has nothing on {missing[0]!r}; run ablation.py first.")
    width, height = 2 * PANEL, HEIGHT + LEGEND
    style = element("style", (files("hesper.report") / "style.css").read_text() + "svg { font-family: system-ui, sans-serif; }")
    paper = element("rect", width=width, height=height, fill="var(--paper)")
    panels = [panel(book, key, name.split(".")[0], index * PANEL) for index, (key, (name, _)) in enumerate(MODELS.items())]
    options.out.write_text(chart("Drift of tokens and heads, alone and together", width, height, [style, paper, *panels, legend()]) + "\n")


if __name__ == "__main__":
    main()
