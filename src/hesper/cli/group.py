"""The command ``hesper``: its verbs, and what becomes of everything that goes wrong in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from hesper.cli.bench import bench
from hesper.cli.compare import compare
from hesper.cli.demo import demo
from hesper.cli.doctor import doctor
from hesper.cli.eval import evaluate
from hesper.cli.export import export
from hesper.cli.failure import TRACEBACK, Failure, explain
from hesper.cli.prune import prune
from hesper.cli.report import report
from hesper.cli.show import show
from hesper.cli.signals import interruptible
from hesper.registry import did_you_mean
from hesper.version import __version__

__all__ = ["main"]

INTERRUPTED = "interrupted; nothing was written"


class Verbs(click.Group):
    """A group whose every failure is one sentence on stderr and an exit code: 1 the job failed, 2 wrong usage or input."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit."""
        extra.pop("standalone_mode", None)
        with interruptible():
            try:
                code = super().main(args, prog_name or "hesper", standalone_mode=False, **extra)
            except click.Abort:  # interrupted before or after the verb
                code = Failure(INTERRUPTED).tell()
            except Failure as error:
                code = error.tell()
            except click.UsageError as error:
                code = Failure(explain(error), 2).tell()
            except click.ClickException as error:
                code = Failure(error.format_message(), error.exit_code).tell()
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb, its exceptions turned into sentences."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would print an empty line
            raise Failure(INTERRUPTED) from error
        except Exception as error:
            if os.environ.get(TRACEBACK) and not isinstance(error, (click.ClickException, click.exceptions.Exit)):
                raise
            raise Failure.of(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which people meet them."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; the nearest ones are offered for one that does not exist."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise Failure(f"There is no command '{args[0]}'; {did_you_mean(args[0], self.commands)}", 2)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs,
    name="hesper",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Begin with:\n\n\b\n  hesper demo",
)
@click.version_option(__version__, message="%(prog)s %(version)s", help="Show the version and exit.")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Make trained vision transformers cheaper to run, within a budget you name.

    A trained model, a folder of images and a budget go in. A smaller, faster model comes out, with its plan, its proof and a report.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for verb in (demo, prune, evaluate, bench, compare, export, show, report, doctor):
    main.add_command(verb)
