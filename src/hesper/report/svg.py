"""Small pieces of SVG: elements, axes, a colour scale, cells on a grid. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hesper.report.figures import power, printable, significant

__all__ = ["Axis", "Colours", "cell_path", "chart", "colours", "element", "frame", "label", "linear", "logarithmic", "short", "tip"]

# Matplotlib's viridis at thirteen places: even in lightness, readable for colour-blind people and in grey.
_VIRIDIS = (
    (68, 1, 84), (72, 31, 112), (68, 57, 131), (59, 82, 139), (49, 104, 142), (40, 124, 142), (33, 145, 140),
    (32, 164, 134), (53, 183, 121), (94, 201, 98), (144, 215, 67), (200, 224, 32), (253, 231, 37),
)  # fmt: skip
_STEPS = (1, 2, 2.5, 5, 10)


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """One element; ``content`` is SVG already, attribute values are escaped, ``_`` in their names stands for ``-``.

    >>> element("rect", x=1.25, stroke_width=2, class_="a<b")
    '<rect x="1.25" stroke-width="2" class="a&lt;b"/>'
    """
    values = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    return f"<{name}{values}>{content}</{name}>" if content else f"<{name}{values}/>"


def tip(text: str) -> str:
    """What a browser shows while the pointer rests on the element this is put into."""
    return f"<title>{escape(printable(text))}</title>"


def label(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None, turn: bool = False) -> str:
    """Text at a place; ``turn`` makes it read upwards."""
    rotation = f"rotate(-90 {_value(x)} {_value(y)})" if turn else None
    return element("text", escape(printable(text)), x=x, y=y, text_anchor=anchor, class_=class_, transform=rotation)


def chart(name: str, width: float, height: float, body: Iterable[str], class_: str = "chart") -> str:
    """A whole figure; ``name`` is what screen readers say."""
    box = f"0 0 {_value(width)} {_value(height)}"
    return element("svg", "".join(body), xmlns="http://www.w3.org/2000/svg", viewBox=box, class_=class_, role="img", aria_label=name)


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, from ``low`` at ``start`` to ``high`` at ``end``, with ``ticks`` to label."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; values outside the scale land on its ends."""
        share = (self._scaled(value) - self._scaled(self.low)) / ((self._scaled(self.high) - self._scaled(self.low)) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def linear(values: Iterable[float], start: float, end: float, *, zero: bool = False, most: float = math.inf, ticks: int = 5) -> Axis:
    """A linear axis around ``values`` that ends on ticks; ``zero`` begins it at 0, ``most`` ends it there at the latest."""
    numbers = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (min(0.0, *numbers) if zero else min(numbers)), max(numbers)
    if high - low < 1e-12 * max(abs(high), 1e-300):
        low, high = (0.0, high or 1.0) if zero else (low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0))
    size = 10 ** math.floor(math.log10((high - low) / ticks))
    step = next(size * factor for factor in _STEPS if size * factor * ticks >= (high - low) * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = tuple(step * index for index in range(first, last + 1) if step * index <= most * (1 + 1e-9))
    return Axis(places[0], max(places[-1], min(high, most)), start, end, places)


def logarithmic(values: Iterable[float], start: float, end: float) -> Axis:
    """A logarithmic axis around the positive ``values``, from power of ten to power of ten where it spans one."""
    numbers = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 1.0]
    first, last = math.floor(math.log10(min(numbers)) + 1e-9), math.ceil(math.log10(max(numbers)) - 1e-9)
    if last - first > 3:
        every = math.ceil((last - first) / 6)
        return Axis(10.0**first, 10.0**last, start, end, tuple(10.0**e for e in range(first, last + 1, every)), log=True)
    steps = [factor * 10.0**e for e in range(first - 1, last + 1) for factor in (1, 2, 5)] + [10.0**last, 10.0 ** (last + 1)]
    low = max(step for step in steps if step <= min(numbers) * (1 + 1e-9))
    high = min(step for step in steps if step >= max(numbers) * (1 - 1e-9) and step > low)
    return Axis(low, high, start, end, tuple(sorted({step for step in steps if low <= step <= high})), log=True)


def short(value: float) -> str:
    """A tick's label.

    >>> short(0.05), short(1e-5)
    ('0.05', '10⁻⁵')
    """
    exponent = round(math.log10(value)) if value > 0 else 0
    if value > 0 and (value < 1e-3 or value >= 1e5) and abs(value / 10.0**exponent - 1) < 1e-9:
        return power(exponent)
    return significant(value)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, names: Mapping[float, str] | None = None, x_grid: bool = True) -> list[str]:
    """Grid lines, tick labels and axis titles; ``names`` overrides labels along x. The left edge needs 52 pixels, the lower one 42."""
    out = []
    for tick in y.ticks:
        out.append(element("line", x1=x.start, x2=x.end, y1=y.at(tick), y2=y.at(tick), class_="grid"))
        out.append(label(x.start - 7, y.at(tick) + 4, short(tick), "end", "dim"))
    for tick in x.ticks:
        if x_grid:
            out.append(element("line", x1=x.at(tick), x2=x.at(tick), y1=y.start, y2=y.end, class_="grid"))
        out.append(label(x.at(tick), y.start + 17, (names or {}).get(tick, short(tick)), "middle", "dim"))
    out.append(label((x.start + x.end) / 2, y.start + 37, x_label, "middle"))
    out.append(label(12, (y.start + y.end) / 2, y_label, "middle", turn=True))
    return out


@dataclass(frozen=True)
class Colours:
    """A logarithmic colour scale from ``low`` to ``high``; what lies outside takes the colour of the nearer end."""

    low: float
    high: float

    def level(self, value: float, levels: int = 64) -> int:
        """The step, from 0 to ``levels`` - 1, that a value falls on."""
        if not value > self.low:
            return 0
        share = math.log(value / self.low) / (math.log(self.high / self.low) or 1.0)
        return min(int(share * levels), levels - 1)

    def of(self, value: float) -> str:
        """The colour of a value, ``#rrggbb``."""
        return shade((self.level(value) + 0.5) / 64)


def colours(values: Iterable[float], decades: float = 4.0) -> Colours | None:
    """A scale for the positive ``values``, down to so many powers of ten below the largest; None where nothing is positive."""
    numbers = [value for value in values if value > 0 and math.isfinite(value)]
    if not numbers:
        return None
    high = max(numbers)
    low = max(min(numbers), high / 10**decades)
    return Colours(low, high) if high > low else Colours(low / 2, high * 2)


def shade(share: float) -> str:
    """The colour at a share of the viridis scale.

    >>> shade(0.0), shade(1.0)
    ('#440154', '#fde725')
    """
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    mixed = [round(a + (b - a) * (place - index)) for a, b in zip(_VIRIDIS[index], _VIRIDIS[index + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def cell_path(places: Sequence[int], columns: int) -> str:
    """Path data that fills cells of a grid of so many ``columns``, numbered along its rows; neighbours in a row become one box.

    >>> cell_path([0, 1, 5], 4)
    'M0 0h2v1h-2zM1 1h1v1h-1z'
    """
    out = []
    ordered, index = sorted(places), 0
    while index < len(ordered):
        row, column = divmod(ordered[index], columns)
        run = 1
        while index + run < len(ordered) and ordered[index + run] == ordered[index] + run and column + run < columns:
            run += 1
        out.append(f"M{column} {row}h{run}v1h-{run}z")
        index += run
    return "".join(out)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(printable(str(value)))
