"""Names for things: found lazily, and when a name is unknown the nearest ones are offered."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

from hesper.errors import HesperError, UsageError

__all__ = ["Registry", "did_you_mean", "suggest"]

T = TypeVar("T")


def suggest(name: str, known: Iterable[str], n: int = 3) -> tuple[str, ...]:
    """Up to ``n`` known names that look like ``name``, nearest first, ignoring case.

    >>> suggest("treshold", ["threshold", "remove", "block"])
    ('threshold',)
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    return tuple(by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n, cutoff=0.6))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The half sentence that ends an error about an unknown ``name``: the nearest names, or else what there is.

    >>> did_you_mean("kll", ["kl", "ce", "heart"])
    "did you mean 'kl'?"
    >>> did_you_mean("zzz", ["kl", "ce", "heart"])
    'known are ce, heart, kl'
    """
    names = sorted(known)
    near = suggest(name, names)
    if near:
        return f"did you mean {' or '.join(repr(match) for match in near)}?"
    return f"known are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "none are known"


class Registry(Generic[T]):
    """Names that stand for objects, or for ``"module:object"`` strings imported at first use; ``what`` is for messages.

    >>> roots: Registry[object] = Registry("root")
    >>> roots.add("sqrt", "math:sqrt")
    >>> roots["sqrt"](9.0)
    3.0
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, T | str] = {}

    def add(self, name: str, target: T | str) -> None:
        """Give ``name`` to ``target``; a name that is taken raises HesperError."""
        if name in self._entries:
            raise HesperError(f"Two {self._what} entries are called {name!r}; rename one of them.")
        self._entries[name] = target

    def __getitem__(self, name: str) -> T:
        """The object called ``name``; UsageError names the nearest ones when there is none, or what must be installed."""
        if name not in self._entries:
            raise UsageError(f"The {self._what} {name!r} is unknown; {did_you_mean(name, self)}")
        target = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = self._entries[name] = cast(T, getattr(importlib.import_module(module), attribute))
            except ModuleNotFoundError as error:
                raise UsageError(f"The {self._what} {name!r} needs the package {error.name!r}; install it first.") from error
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
