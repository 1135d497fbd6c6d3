"""Options that several verbs share, and what every verb prints alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from hesper.runs import RunFolder

__all__ = [
    "AutoOr",
    "as_json",
    "declined",
    "example",
    "file_path",
    "print_skipped",
    "with_batch_size",
    "with_class_map",
    "with_device",
    "with_json",
    "with_labels",
    "with_weights",
]

F = TypeVar("F", bound=Callable[..., Any])
MOST_NAMED = 5


def file_path() -> click.Path:
    """A path, unchecked: whether it exists is judged, in better words, where it is used."""
    return click.Path(path_type=Path)


class AutoOr(click.IntRange):
    """A whole number in a range, or the word auto."""

    name = "number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or "auto" as it is."""
        return value if value == "auto" else super().convert(value, param, ctx)


def example(*lines: str) -> str:
    """The epilog of a verb: one real example, its lines kept as they are."""
    return "Example:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


def with_weights(command: F) -> F:
    """--weights FILE."""
    text = "Weights of the dense model, .safetensors or a .pth state dict; without it its pretrained ones (downloaded on first use)."
    return click.option("--weights", type=file_path(), metavar="FILE", help=text)(command)


def with_class_map(command: F) -> F:
    """--class-map FILE."""
    text = "The model's class names in order, one a line (of 'n01440764 tench' the first word counts): which class folder has which label."
    return click.option("--class-map", type=file_path(), metavar="FILE", help=text)(command)


def with_labels(command: F) -> F:
    """--labels/--no-labels, for the images of --data."""
    text = "Whether the class folders of --data are labels; found out if neither is given."
    return click.option("--labels/--no-labels", default=None, help=text)(command)


def with_batch_size(command: F) -> F:
    """--batch-size N."""
    return click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Images at a time.")(
        command
    )


def with_device(command: F) -> F:
    """--device cpu|cuda."""
    return click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute.")(command)


def with_json(command: F) -> F:
    """--json."""
    return click.option("--json", "json_", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")(command)


def as_json(values: Mapping[str, Any]) -> str:
    """One JSON object on one line; NaN and infinity, which JSON lacks, are refused."""
    return json.dumps(values, allow_nan=False)


def declined(run: RunFolder) -> dict[str, str]:
    """Why what might have improved the run is not in it, by name."""
    attempts = run.entries[0].results.get("improvements")
    if not isinstance(attempts, dict):  # the record is a text file, and people edit those
        return {}
    return {name: attempt["why"] for name, attempt in attempts.items() if not attempt["taken"] and attempt["why"] != "not asked for"}


def print_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Name, on stderr, the files that could not be used: (file, reason)."""
    if not skipped:
        return
    named = "; ".join(f"{file} ({reason})" for file, reason in skipped[:MOST_NAMED])
    rest = f"; and {len(skipped) - MOST_NAMED} more" if len(skipped) > MOST_NAMED else ""
    click.echo(f"Skipped {len(skipped)} file{'s' if len(skipped) > 1 else ''}: {named}{rest}.", err=True)
