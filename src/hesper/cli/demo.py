"""``hesper demo``: the whole story on real digits, without network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hesper.cli.options import as_json, example, file_path, with_json
from hesper.cli.progress import Stages
from hesper.errors import UsageError

if TYPE_CHECKING:
    from hesper.demo import Story

__all__ = ["demo"]


@click.command(short_help="The whole story on real digits, in two minutes.", epilog=example("hesper demo --out digits"))
@click.option("--out", type=file_path(), default=Path("hesper-demo"), show_default=True, metavar="DIR", help="The folder to make.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N", help="For all that is random.")
@with_json
def demo(out: Path, seed: int, json_: bool) -> None:
    """Train a small vision transformer on real digits, prune it within a loss budget, and show what that changed.

    Takes about two minutes on two CPU cores, needs no network and opens nothing; everything is written to one folder.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; choose another folder with --out, such as --out {out}-2, or remove it.")
    with Stages() as stages:
        stages("Get ready", 0, 0)
        from hesper.demo import tell

        story = tell(out, seed=seed, progress=stages)
    click.echo(as_json(story.summary()) if json_ else narrate(story))


def narrate(story: Story) -> str:
    """The story in a few lines."""
    found, out = story.evaluation, story.out
    dense, cut = (1000 * seconds for seconds in story.timing.seconds)
    timing, taught = story.timing, f"learned {story.images['train']} handwritten digits in {story.seconds['train']:.0f} s"
    return f"""\
A vision transformer of {story.parameters:,} parameters {taught}.
Pruned with a budget on the loss, no weight trained, {story.images["calib"]} calibration images:
  {story.statement}

On {found["n"]} test images it had never seen:
  accuracy   {_percent(found["dense_top1"])} dense, {_percent(found["top1"])} pruned
  agreement  {_percent(found["agreement"])} of the decisions are the same
  drift      {found["drift_kl"]:.4f} nats (KL from dense to pruned)
  MACs       {_percent(found["macs_ratio"])} kept, {found["macs_mean"] / 1e6:.1f} of {found["macs_dense"] / 1e6:.1f} million an image
  time       {dense:.1f} ms dense, {cut:.1f} ms pruned for 32 images on {story.threads} threads:
             {timing.ratio:.2f} times as fast (95 % between {timing.low:.2f} and {timing.high:.2f})

  report   {out / "run" / "report.html"}
  run      {out / "run"}    (hesper show {out / "run"})
  weights  {out / "digits_vit.safetensors"}
  images   {out / "data"}    (hesper eval {out / "run"} --data {out / "data" / "test"})"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
