"""Values of a record as far as they are what they should be; records are text files, and people edit those."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Matrix", "column", "matrix", "number", "table", "text"]

Matrix = tuple[tuple[float, ...], ...]


def table(value: Any) -> Mapping[str, Any]:
    """A table, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None.

    >>> number(3), number(float("nan")), number("3"), number(True)
    (3.0, None, None, None)
    """
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def text(value: Any) -> str | None:
    """Words, or None."""
    return value if isinstance(value, str) and value else None


def column(value: Any, length: int) -> tuple[float, ...] | None:
    """So many numbers, or None."""
    if not isinstance(value, list) or len(value) != length or not value:
        return None
    numbers = tuple(found for item in value if (found := number(item)) is not None)
    return numbers if len(numbers) == length else None


def matrix(value: Any, width: int) -> Matrix | None:
    """Rows of so many numbers, or None."""
    if not isinstance(value, list):
        return None
    rows = tuple(row for item in value if (row := column(item, width)) is not None)
    return rows if rows and len(rows) == len(value) else None
