"""Exporters print much about their own insides; what they fail by stands at the bottom of a chain."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["innermost", "quietly"]

LONGEST = 300


def innermost(error: Exception) -> str:
    """The first line of the reason at the bottom of a chain of exceptions.

    >>> innermost(ValueError("no such operator\\nand a long listing"))
    'no such operator'
    """
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:LONGEST]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters print and warn of, which speaks of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
