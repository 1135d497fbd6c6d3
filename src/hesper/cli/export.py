"""``hesper export``: a run as one file for another runtime, compared with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hesper.cli.options import as_json, example, file_path, with_json, with_weights
from hesper.cli.progress import Stages
from hesper.cli.recording import record

__all__ = ["export", "table"]


@click.command(
    short_help="Write a run as ONNX, a torch.export archive or an ExecuTorch program.",
    epilog=example("hesper export runs/vit-tiny-fixed --format onnx --out vit-tiny.onnx --data imagenet/val"),
)
@click.argument("target", metavar="RUN|MODEL")
@click.option("--out", type=file_path(), required=True, metavar="FILE", help="The file to write: .onnx, .pt2 or .pte.")
@click.option("--format", "format_", metavar="NAME", help="onnx, torch or executorch; by the ending of FILE if not given.")
@click.option("--dense", is_flag=True, help="The dense model of the RUN, to compare with.")
@click.option("--dial", type=float, metavar="NATS", help="Let tokens go below this price instead of the run's own.")
@click.option("--data", type=file_path(), metavar="DIR", help="Images to compare on; without it those a RUN keeps for its report.")
@click.option("--opset", type=int, metavar="N", help="Of ONNX; 20 if not given.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of weights and activations; decisions are taken in single precision.",
)
@with_weights
@with_json
def export(
    target: str,
    out: Path,
    format_: str | None,
    dense: bool,
    dial: float | None,
    data: Path | None,
    opset: int | None,
    precision: Any,
    weights: Path | None,
    json_: bool,
) -> None:
    """Write RUN, or a dense MODEL by its name, as one file, and compare it with PyTorch on real images.

    Plans of fixed counts (hesper prune --counts fixed) take batches of any size; where counts adapt to the image, one image at a time.
    """
    with Stages() as stages:
        stages("Open model", 0, 0)
        from hesper.exporting import export as write

        made = write(
            target,
            out=out,
            format=format_,
            weights=weights,
            dense=dense,
            dial=dial,
            data=data,
            opset=opset,
            precision=precision,
            progress=stages,
        )
    figures = made.summary()
    record(target, figures, f"{made.path} is written", files={made.path.name: made.sha256})
    click.echo(as_json(figures) if json_ else table(figures))


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    notes, parity, details = figures["notes"], figures["parity"], figures["details"]
    one = f"one image at a time{', since counts adapt to it' if notes['adaptive'] else ''}"
    batch = "any number of images" if notes["largest_batch"] is None else one
    rows = [
        ("file", f"{figures['path']}, {figures['bytes'] / 2**20:.1f} MiB, {notes['precision']}"),
        ("takes", f"{batch}, {notes['image_size'][0]} x {notes['image_size'][1]} pixels"),
        ("parity", f"{100 * parity['agreement']:.2f} % equal top-1 on {parity['images']} images, {figures['runtime']}"),
        ("", f"largest difference of a logit {parity['max_error']:.2g}, largest logit {parity['largest_logit']:.3g}"),
    ]
    if "opset" in details:
        refused = details["tensorrt_refuses"]
        rows += [
            ("opset", str(details["opset"])),
            (
                "TensorRT",
                f"may not take {', '.join(refused)}" if refused else "takes every operator (by the list of 10.15; not tried here)",
            ),
        ]
    return "\n".join(f"{name:<10}{value}" for name, value in rows)
