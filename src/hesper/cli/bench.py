"""``hesper bench``: how fast a run or a dense model is on this device, beside another, and what energy it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hesper.cli.failure import Failure
from hesper.cli.options import as_json, example, file_path, with_device, with_json, with_weights
from hesper.cli.progress import Stages
from hesper.cli.recording import record

__all__ = ["bench", "table"]


class Sizes(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Batch sizes: whole numbers of at least 1, with commas between."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers, each once, in order."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isascii() and word.isdigit() and len(word) < 12 and int(word) for word in words):
            self.fail(f"{value!r} is no list of batch sizes; give whole numbers of at least 1 such as 1,8,32", param, ctx)
        return tuple(sorted({int(word) for word in words}))


@click.command(
    short_help="Measure latency, throughput, memory and energy on this device.",
    epilog=example("hesper bench runs/vit-tiny-066 --batch-size 1,32 --data imagenet/val"),
)
@click.argument("target", metavar="RUN|MODEL|FILE")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=Sizes(),
    default="1",
    show_default=True,
    metavar="N[,N...]",
    help="Images at a time, one or several.",
)
@click.option(
    "--baseline", metavar="RUN|MODEL|FILE|none", help="What it is compared with, in turns; for a RUN its dense model if nothing is given."
)
@click.option(
    "--data",
    type=file_path(),
    metavar="DIR",
    help="Images to run on, or a run that keeps some; without it those a RUN keeps for its report.",
)
@with_weights
@click.option("--baseline-weights", type=file_path(), metavar="FILE", help="Weights of a --baseline that is a MODEL by its name.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    help="Which execution provider of ONNX Runtime runs .onnx files; that of --device if not given.",
)
@with_device
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of models in PyTorch. Under fp16 and bf16 tokens are let go in single precision; tf32 shortens all products.",
)
@click.option(
    "--compile",
    type=click.Choice(["default", "reduce-overhead", "max-autotune"]),
    help="Compile models in PyTorch, the baseline too, in this mode of torch.compile; a RUN of fixed counts as one graph.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Of the processor; torch's choice if not given.")
@click.option(
    "--rounds", type=click.IntRange(3), default=10, show_default=True, metavar="N", help="Timed calls of each model in a process."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="That take times, one after the other: each is one sample, as memory's place alone moves a model by a tenth.",
)
@click.option(
    "--meter", default="auto", show_default=True, metavar="NAME", help="Energy meter (hesper doctor lists them), replay:FILE, auto or none."
)
@click.option(
    "--energy-seconds",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="S",
    help="How long a model runs without a pause for its energy, in each process and at least three times.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=1800.0,
    show_default=True,
    metavar="S",
    help="After which a batch size is given up.",
)
@with_json
def bench(
    target: str,
    batch_sizes: tuple[int, ...],
    baseline: str | None,
    data: Path | None,
    weights: Path | None,
    baseline_weights: Path | None,
    provider: str | None,
    device: str,
    precision: str,
    compile: str | None,
    threads: int | None,
    rounds: int,
    processes: int,
    meter: str,
    energy_seconds: float,
    timeout: float,
    json_: bool,
) -> None:
    """Time RUN, a dense MODEL by its name, or an exported FILE on this device, in turns with a baseline, batch size by batch size.

    Every batch size runs in processes of its own: a crash or a lack of memory is a result, and the interval of a speed-up says how far
    processes differ. A run's record gets an entry.
    """
    with Stages() as stages:
        stages("Look at this machine", 0, 0)
        from hesper.benchmark.run import bench as measure

        found = measure(
            target,
            baseline=baseline,
            batch_sizes=batch_sizes,
            data=data,
            weights=weights,
            baseline_weights=baseline_weights,
            provider=provider,
            device=device,
            precision=precision,
            compile=compile,
            threads=threads,
            rounds=rounds,
            processes=processes,
            meter=meter,
            stretch_seconds=energy_seconds,
            timeout=timeout,
            progress=stages,
        )
    figures = found.summary()
    record(target, figures, "The bench is done", _found(figures))
    nothing = not any(cell["models"] for cell in figures["cells"])
    if json_ or not nothing:
        click.echo(as_json(figures) if json_ else table(figures))
    if nothing:
        reasons = "; ".join(f"batches of {cell['batch_size']}: {cell['ending']} ({cell['reason']})" for cell in figures["cells"])
        raise Failure(f"No batch size came to an end: {reasons}")
    if figures["cells"][-1]["ending"] == "interrupted":
        raise Failure("interrupted; the batch sizes that were finished are above, and in the record of a RUN")


def _found(figures: Mapping[str, Any]) -> str:
    """The most important of the figures, in words."""
    times = [(cell["batch_size"], each) for cell in figures["cells"] if (each := cell["models"].get("target"))]
    return ", ".join(f"{each['latency_ms']['p50']:.4g} ms for batches of {size}" for size, each in times)


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    head = f"{'batch':>6}  {'model':<9}{'p50 ms':>9}{'p90':>9}{'p95':>9}{'p99':>9}{'images/s':>10}{'memory':>10}{'J/image':>10}"
    lines = [f"target    {figures['target']}", f"baseline  {figures['baseline'] or 'none'}", "", head]
    for cell in figures["cells"]:
        lines += _rows(cell)
    energy = figures["meter"] or f"none: {figures['meter_reason']}"
    unread = sorted({each["no_energy_because"] for cell in figures["cells"] for each in cell["models"].values()} - {None})
    lines += ["", f"energy    {energy}"]
    lines += [f"          not given: {reason}" for reason in unread if figures["meter"]]
    restless = sorted({cell["no_idle_because"] for cell in figures["cells"]} - {None})
    lines += [f"          without that at rest not given: {reason}" for reason in restless]
    lines += [
        f"runtime   {runtime}"
        for runtime in sorted({str(each["runtime"]) for cell in figures["cells"] for each in cell["models"].values()})
    ]
    if any(len(each["seconds"]) == 1 for cell in figures["cells"] for each in cell["models"].values()):
        lines.append("note      intervals are of calls in one process; how far processes differ, as they do, is seen with more --processes")
    lines += [f"warning   {warning}" for warning in figures["warnings"]]
    return "\n".join(lines)


def _rows(cell: Mapping[str, Any]) -> list[str]:
    rows = []
    for place, (name, each) in enumerate(cell["models"].items()):
        times = "".join(f"{each['latency_ms'][point]:>9.2f}" for point in ("p50", "p90", "p95", "p99"))
        memory = each["device_bytes"] or each["host_bytes"]
        held = "-" if memory is None else f"{memory / 2**20:.0f} MiB"
        joules = "-" if each["joules_per_image"] is None else f"{each['joules_per_image']:.4g}"
        size = cell["batch_size"] if place == 0 else ""
        rows.append(f"{size:>6}  {name:<9}{times}{each['images_per_s']:>10.1f}{held:>10}{joules:>10}")
    if cell["speedup"] is not None:
        share = cell["models"]["target"]["macs_mean"] / cell["models"]["baseline"]["macs_mean"]
        ratio, low, high = (cell["speedup"][name] for name in ("ratio", "low", "high"))
        rows.append(f"{'':>6}  {ratio:.3f} [{low:.3f}, {high:.3f}] times as fast with {share:.3f} of the MACs")
    if cell["ending"] != "done":
        rows.append(f"{cell['batch_size']:>6}  {cell['ending']}: {cell['reason']}")
    return rows
