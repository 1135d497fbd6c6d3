"""``hesper show``: a plan on one screen."""

from __future__ import annotations

from pathlib import Path

import click

from hesper.cli.options import example, file_path

__all__ = ["show"]


@click.command(short_help="Show a plan on one screen.", epilog=example("hesper show runs/vit-tiny-066"))
@click.argument("target", metavar="RUN|PLAN.TOML", type=file_path())
def show(target: Path) -> None:
    """Show the plan of RUN, or of a plan.toml, on one screen.

    A run is checked first: a plan or weights that were changed since it was made are refused.
    """
    from hesper.plan.show import render
    from hesper.plan.toml import read_plan
    from hesper.runs import open_run

    plan = open_run(target).plan if target.is_dir() else read_plan(target)
    click.echo(render(plan), nl=False)
