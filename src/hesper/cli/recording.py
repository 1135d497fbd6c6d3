"""What a verb adds to a run's record after its work is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hesper.cli.failure import Failure
from hesper.errors import HesperError

__all__ = ["record"]


def record(target: str, results: Mapping[str, Any], done: str, found: str = "", files: Mapping[str, str] | None = None) -> None:
    """Add an entry of this verb, with its options, to the record of ``target`` if that is a run folder.

    Where the record cannot take it, the failure says what is ``done`` and what was ``found``, so that nothing is lost.
    """
    from hesper.runs import RECORD, Entry, append, environment, utc_now

    if not Path(target).is_dir():
        return
    context = click.get_current_context()
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in context.params.items() if name != "json_"}
    try:
        append(Path(target) / RECORD, Entry(str(context.info_name), utc_now(), asked, environment(), results, files or {}))
    except (HesperError, OSError) as error:
        rest = f"; it found {found}" if found else ""
        raise Failure(f"{done}, but {Path(target) / RECORD} could not take it ({str(error).rstrip('.')}){rest}") from error
