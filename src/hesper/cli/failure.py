"""What went wrong, in one sentence on stderr."""

from __future__ import annotations

import sys

import click

from hesper.errors import DISK_FULL, HesperError
from hesper.parallel import leads, team

__all__ = ["TRACEBACK", "Failure", "explain"]

TRACEBACK = "HESPER_TRACEBACK"


class Failure(click.ClickException):
    """A sentence for the user and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.code = exit_code

    @classmethod
    def of(cls, error: Exception) -> Exception:
        """The failure that stands for an exception; what click itself handles stays as it is."""
        if isinstance(error, HesperError):
            return cls(str(error), error.exit_code)
        if isinstance(error, (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError)):
            return error
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return cls("The disk is full; free some space and run again.")
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return cls(f"{error.filename}: {error.strerror.lower()}.")
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return cls("There is not enough memory; give a smaller --batch-size.")
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        return cls(
            f"An unexpected {what.rstrip('.')} (this is a fault of hesper; run again with {TRACEBACK}=1 to see where, and report it)."
        )

    def tell(self) -> int:
        """Print the sentence; gives the exit code."""
        sentence = " ".join(self.format_message().split())
        if not _first_to_say(sentence):
            return self.code
        after_keys = "\n" if sys.stderr.isatty() and "interrupted" in sentence else ""  # the terminal has just shown ^C
        click.echo(f"{after_keys}hesper: {sentence}{'' if sentence.endswith(('.', '?', '!')) else '.'}", file=sys.stderr)
        return self.code


def _first_to_say(sentence: str) -> bool:
    """Of several processes that say the same only one is heard, if they are connected; otherwise that of rank 0."""
    return team().says(sentence) if team.cache_info().currsize else leads()


def explain(error: click.UsageError) -> str:
    """Click's account of a wrong command line, and where the right one is explained."""
    path = error.ctx.command_path if error.ctx else "hesper"
    return f"{error.format_message().rstrip('.')} (see '{path} --help')."
