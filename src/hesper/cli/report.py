"""``hesper report``: one HTML page about one or several runs."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hesper.cli.options import as_json, example, file_path, with_json
from hesper.cli.progress import Stages
from hesper.errors import UsageError

__all__ = ["report"]


@click.command(
    short_help="Write an HTML page about runs.", epilog=example("hesper report runs/vit-tiny-066 runs/vit-tiny-050 --out report.html")
)
@click.argument("runs", metavar="RUN...", type=file_path(), nargs=-1, required=True)
@click.option("--out", type=file_path(), required=True, metavar="FILE", help="The HTML file to write; it needs no other file.")
@click.option(
    "--bench",
    "benches",
    type=file_path(),
    multiple=True,
    metavar="FILE",
    help="A bench of another device beside them: a copied record.json, a RUN, or what hesper bench --json printed; several times.",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@with_json
def report(runs: tuple[Path, ...], out: Path, benches: tuple[Path, ...], force: bool, json_: bool) -> None:
    """Write one self-contained HTML page about the RUNs: what was cut, what it cost, how fast it is, and the evidence."""
    if os.path.lexists(out) and not force:
        raise UsageError(f"{out} exists already; give --out another file, or --force to replace it.")
    with Stages() as stages:
        stages("Write the report", 0, 0)
        from hesper.report import write_report

        write_report(runs, out, benches)
    click.echo(as_json({"report": str(out), "runs": [str(run) for run in runs]}) if json_ else f"Report  {out}")
