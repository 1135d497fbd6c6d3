"""``hesper compare``: two benches side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hesper.cli.options import as_json, example, file_path, with_json

if TYPE_CHECKING:
    from hesper.benchmark.compare import Compared

__all__ = ["compare", "table"]


@click.command(
    short_help="Compare two benches, of two days, settings or devices.",
    epilog=example("hesper compare orin-15w/record.json orin-25w/record.json"),
)
@click.argument("first", metavar="RUN|FILE", type=file_path())
@click.argument("second", metavar="RUN|FILE", type=file_path())
@with_json
def compare(first: Path, second: Path, json_: bool) -> None:
    """Compare the last bench of two RUN folders, of two record.json, or two files that hesper bench --json printed.

    Says, model by model and batch size by batch size, how many times as long the second took, and warns where the two machines, versions
    or settings differ.
    """
    from hesper.benchmark.compare import compare_benches, read_bench

    found = compare_benches(read_bench(first), read_bench(second))
    click.echo(as_json(dataclasses.asdict(found)) if json_ else table(found, first, second))


def table(found: Compared, first: Path, second: Path) -> str:
    """The comparison for people."""
    lines = [f"first   {first}", f"second  {second}", "", f"{'batch':>6}  {'model':<9}{'first ms':>10}{'second':>10}   second / first"]
    for row in found.rows:
        lines.append(
            f"{row.batch_size:>6}  {row.model:<9}{row.ms[0]:>10.2f}{row.ms[1]:>10.2f}   {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]"
        )
        if row.speedups is not None:
            words = " and ".join(f"{ratio:.3f} [{low:.3f}, {high:.3f}]" for ratio, low, high in row.speedups)
            lines.append(f"{'':>8}times as fast as its baseline: {words}")
        if None not in row.joules:
            lines.append(f"{'':>8}joules an image: {row.joules[0]:.4g} and {row.joules[1]:.4g}")
    return "\n".join([*lines, *([""] if found.warnings else []), *(f"warning  {warning}" for warning in found.warnings)])
