"""``hesper show``: a plan on one screen."""

from __future__ import annotations

from pathlib import Path

import click

from hesper.cli.options import as_json, declined, example, file_path, with_json

__all__ = ["show"]


@click.command(short_help="Show a plan on one screen.", epilog=example("hesper show runs/vit-tiny-066"))
@click.argument("target", metavar="RUN|PLAN.TOML", type=file_path())
@with_json
def show(target: Path, json_: bool) -> None:
    """Show the plan of RUN, or of a plan.toml, on one screen.

    A run is checked first: a plan or weights that were changed since it was made are refused.
    """
    from hesper.plan import plain, plan_hash, read_plan, render
    from hesper.runs import open_run

    run = open_run(target) if target.is_dir() else None
    plan = read_plan(target) if run is None else run.plan
    words = {"plan": plain(plan), "hash": plan_hash(plan)}
    click.echo(as_json(words) + "\n" if json_ else render(plan, None if run is None else declined(run)), nl=False)
