"""``hesper eval``: a run or a dense model on a folder of images, beside the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import click

from hesper.cli.options import (
    as_json,
    example,
    file_path,
    print_skipped,
    with_batch_size,
    with_class_map,
    with_device,
    with_json,
    with_labels,
    with_weights,
)
from hesper.cli.progress import Stages
from hesper.errors import Unverified
from hesper.parallel import leads

__all__ = ["evaluate", "table"]


@click.command(
    "eval",
    short_help="Evaluate a run or a dense model on images.",
    epilog=example("hesper eval runs/vit-tiny-066 --data imagenet/val --json"),
)
@click.argument("target", metavar="RUN|MODEL")
@click.option(
    "--data",
    type=file_path(),
    required=True,
    metavar="DIR",
    help="Images: a folder (labelled by class folders), tar shards or hfds:NAME[:SPLIT].",
)
@with_weights
@with_class_map
@with_labels
@click.option(
    "--dial", type=float, metavar="NATS", help="Let tokens go below this price instead of the run's own (hesper show lists some)."
)
@with_batch_size
@with_device
@with_json
def evaluate(
    target: str,
    data: Path,
    weights: Path | None,
    class_map: Path | None,
    labels: bool | None,
    dial: float | None,
    batch_size: int,
    device: str,
    json_: bool,
) -> None:
    """Evaluate RUN, or a dense MODEL by its name (timm's, or hf:NAME), paired with the dense model on the same images.

    A run's record gets an entry. Multiply-accumulates are those that really ran, the decisions' own included, per image.
    """
    skipped: list[tuple[str, str]] = []
    with Stages() as stages:
        stages("Open model and images", 0, 0)
        from hesper import api

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", Unverified)
            result = api.evaluate(
                target,
                data=data,
                weights=weights,
                class_map=class_map,
                labelled=labels,
                dial=dial,
                batch_size=batch_size,
                device=device,
                progress=stages,
                skipped=lambda files: skipped.extend((file.file, file.reason) for file in files),
            )
        if not leads():
            return
    for warning in said:
        if issubclass(warning.category, Unverified):
            click.echo(f"hesper: {warning.message}", err=True)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    print_skipped(skipped)
    figures = result.summary()
    click.echo(as_json({**figures, "skipped": len(skipped)}) if json_ else table(figures))


def table(figures: Mapping[str, float | int | None]) -> str:
    """The figures of an evaluation for people; what needs labels is left out without them."""
    rows = [("images", f"{figures['n']}", "")]
    if figures["top1"] is not None:
        rows += [
            ("top-1", _share(figures["top1"]), f"dense {_share(figures['dense_top1'])}"),
            ("top-5", _share(figures["top5"]), ""),
            ("loss", f"{figures['loss']:.4f} nats", f"dense {figures['dense_loss']:.4f}"),
        ]
    least, most, dense = (_millions(figures[f"macs_{name}"]) for name in ("min", "max", "dense"))
    rows += [
        ("agreement", _share(figures["agreement"]), f"+- {_share(figures['agreement_stderr'])}"),
        ("drift", f"{figures['drift_kl']:.4g} nats", f"+- {figures['drift_kl_stderr']:.2g}"),
        ("MACs kept", _share(figures["macs_ratio"]), f"{_millions(figures['macs_mean'])} of {dense}, from {least} to {most}"),
        ("time", f"{figures['seconds']:.2f} s", "the cut model alone"),
    ]
    return "\n".join(f"{name:<11}{value:<16}{note}".rstrip() for name, value, note in rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _millions(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} M"
