"""Whether the fields of a settings class hold what their annotations say."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from hesper.errors import UsageError

__all__ = ["check_kinds"]

_NAMES = {bool: "True or False", int: "a whole number", float: "a number"}


def check_kinds(settings: object, what: str) -> None:
    """Raise UsageError for a field of a dataclass that holds another kind of value than bool, int, float or a word as annotated.

    Fields annotated with a union are right if any part of it is; fields of other kinds are not looked at.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Oven:
        ...     degrees: int | Literal["auto"]
        >>> check_kinds(Oven("auto"), "setting")
        >>> check_kinds(Oven(2.5), "setting")
        Traceback (most recent call last):
            ...
        hesper.errors.UsageError: The setting degrees is 2.5; use 'auto' or a whole number.
    """
    for name, hint in get_type_hints(type(settings), localns={"Literal": Literal}).items():
        parts = (hint,) if hint in _NAMES or get_origin(hint) is Literal else get_args(hint)
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        kinds = [part for part in parts if part in _NAMES]
        value = getattr(settings, name)
        if (words or kinds) and value not in words and not any(_is(value, kind) for kind in kinds):
            known = [*map(repr, words), *(_NAMES[kind] for kind in kinds)]
            raise UsageError(f"The {what} {name} is {value!r}; use {' or '.join(known)}.")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) or (isinstance(value, float) and not isinstance(value, bool))  # numpy's float64 too
    return type(value) is kind
