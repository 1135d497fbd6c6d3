"""Progress on stderr: bars in a terminal, elsewhere a line for every stage that took more than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

from hesper.parallel import leads

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Stages"]

WORTH_TELLING = 2.0


class Stages:
    """Told (stage, done, total) as work proceeds; a total of 0 is a stage whose length is not known.

    A stage that starts again, as a search does, is one bar that counts its rounds.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._done = 0
        self._rounds = 1
        self._started = time.monotonic()

    def __enter__(self) -> Stages:
        if sys.stderr.isatty() and leads():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images or rounds of ``stage`` are finished."""
        if stage != self._stage:
            self._finish()
            self._begin(stage)
        elif done < self._done:
            self._rounds += 1
        self._done = done
        if self._bars is not None and self._task is not None:
            name = stage if self._rounds == 1 else f"{stage} ({self._rounds})"
            self._bars.update(self._task, description=name, completed=done, total=total or None)

    def _begin(self, stage: str) -> None:
        self._stage, self._done, self._rounds, self._started = stage, 0, 1, time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(stage, total=None)

    def _finish(self) -> None:
        """Leave a trace of the stage that ends, if it was long enough to wonder about."""
        seconds = time.monotonic() - self._started
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._stage and seconds >= WORTH_TELLING:
            self.say(f"{self._stage}: {seconds:.0f} s{f', {self._rounds} rounds' if self._rounds > 1 else ''}")

    def say(self, line: str) -> None:
        """Print a line on stderr, beside the bars; of several processes one prints."""
        if not leads():
            return
        if self._bars is not None:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            click.echo(line, err=True)
