"""Figures as people read them: rounded only here, with their error and unit."""

from __future__ import annotations

import math

__all__ = ["change", "percent", "plus_minus", "power", "printable", "shape", "significant", "spread", "whole"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
THIN = "\u202f"  # narrow no-break space: a number and its unit stay on one line


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits; powers of ten where zeros would have to be counted.

    >>> significant(0.0170112), significant(0.0000123456), significant(12.0), significant(1234567.0)
    ('0.017', '1.23 × 10⁻⁵', '12', '1.23 × 10⁶')
    """
    if value == 0 or not math.isfinite(value):
        return str(value) if value else "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{float(f'{value:.{digits}g}'):.10f}".rstrip("0").rstrip(".").replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa).replace("-", "−")
    return f"{mantissa} × {power(int(exponent))}"


def power(exponent: int) -> str:
    """A power of ten.

    >>> power(-3)
    '10⁻³'
    """
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.6374).replace(chr(0x202f), " ")
    '63.7 %'
    """
    return f"{100 * share:.{digits}f}{THIN}%"


def plus_minus(mean: float, stderr: float | None) -> str:
    """A mean with its standard error, both to the error's second digit.

    >>> plus_minus(0.028524, 0.0054268), plus_minus(0.5, None), plus_minus(1.0, 0.0)
    ('0.0285 ± 0.0054', '0.5', '1 ± 0')
    """
    if not stderr:
        return significant(mean, 4) + ("" if stderr is None else " ± 0")
    if stderr < 1e-4:
        return f"{significant(mean)} ± {significant(stderr, 2)}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{mean:.{decimals}f} ± {stderr:.{decimals}f}".replace("-", "−")


def spread(mean: float, stderr: float | None) -> str:
    """A share with its standard error, as percentages.

    >>> spread(0.91, 0.0288).replace(chr(0x202f), " ")
    '91.0 ± 2.9 %'
    """
    return f"{100 * mean:.1f}{THIN}%" if stderr is None else f"{100 * mean:.1f} ± {100 * stderr:.1f}{THIN}%"


def change(mean: float, stderr: float | None) -> str:
    """A difference of shares, in percentage points.

    >>> change(-0.01, 0.0225), change(0.002, None)
    ('−1.0 ± 2.2 points', '+0.2 points')
    """
    sign = "−" if round(mean, 3) < 0 else "+" if round(mean, 3) > 0 else ""
    return f"{sign}{abs(100 * mean):.1f}{'' if stderr is None else f' ± {100 * stderr:.1f}'} points"


def whole(count: float) -> str:
    """A count, exact, in groups of three.

    >>> whole(1253683200).replace(chr(0x202f), " ")
    '1 253 683 200'
    """
    return f"{round(count):,}".replace(",", THIN)


def shape(size: tuple[int, ...]) -> str:
    """Sizes with a multiplication sign.

    >>> shape((14, 14))
    '14 × 14'
    """
    return " × ".join(map(str, size))


def printable(text: str) -> str:
    """Text without the control characters and lone surrogates that no document may hold.

    >>> printable("a" + chr(0) + "b" + chr(0xdc80))
    'a�b�'
    """
    return "".join(
        c if c in "\n\t" or ((c.isprintable() or c.isspace()) and not _forbidden(c)) else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _forbidden(character: str) -> bool:
    code = ord(character)
    return code < 0x20 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF) or 0x7F <= code < 0xA0
