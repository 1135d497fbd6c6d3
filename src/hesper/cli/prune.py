"""``hesper prune``: a model, images and a budget in; a run folder out."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hesper.cli.options import (
    AutoOr,
    as_json,
    declined,
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
from hesper.errors import UsageError
from hesper.parallel import leads

if TYPE_CHECKING:
    from hesper.heart.settings import Settings
    from hesper.plan import Budget
    from hesper.runs import RunFolder

__all__ = ["prune", "summary", "write_report_in"]

BLOCKS = (
    "every",
    "every-early",
    "alternate",
    "alternate-middle",
    "alternate-early",
    "third-middle",
    "third-early",
    "once",
    "once-early",
    "once-first",
)
BUDGETS = {
    "macs": "--macs",
    "loss": "--loss-budget",
    "disagreement": "--max-disagreement",
    "latency": "--latency",
    "latency_ms": "--latency-ms",
    "energy": "--energy",
}


@click.command(
    short_help="Prune a model within a budget.",
    epilog=example(
        "hesper prune vit_tiny_patch16_224.augreg_in21k_ft_in1k \\",
        "    --calib imagenet/calib --class-map imagenet/classes.txt \\",
        "    --macs 0.66 --data imagenet/val --out runs/vit-tiny-066",
    ),
)
@click.argument("model")
@click.option(
    "--calib",
    type=file_path(),
    required=True,
    metavar="DIR",
    help="Calibration images: a folder, tar shards or hfds:NAME[:SPLIT]; half of them only verify.",
)
@click.option("--out", type=file_path(), required=True, metavar="RUN", help="The run folder to make; it must not exist.")
@click.option("--macs", type=float, metavar="RATIO", help="Budget: keep at most this share of the multiply-accumulates, such as 0.66.")
@click.option("--loss-budget", type=float, metavar="NATS", help="Budget: drift at most this far from the dense model, KL in nats.")
@click.option("--max-disagreement", type=float, metavar="P", help="Budget: change at most this share of the top-1 decisions.")
@click.option(
    "--latency", type=float, metavar="RATIO", help="Budget: take this share of the dense model's time on this device, such as 0.7."
)
@click.option("--latency-ms", type=float, metavar="MS", help="Budget: take so many milliseconds a batch on this device.")
@click.option("--energy", type=float, metavar="RATIO", help="Budget: take this share of the dense model's energy on this device.")
@click.option(
    "--device-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Images at a time that --latency, --latency-ms or --energy is about.",
)
@click.option(
    "--device-runtime",
    type=click.Choice(["torch", "onnx"]),
    default="torch",
    show_default=True,
    help="That runs it there: PyTorch as it is, or ONNX Runtime as hesper export writes it.",
)
@click.option("--meter", default="auto", show_default=True, metavar="NAME", help="That reads energy for --energy, as in hesper bench.")
@click.option("--confidence", type=float, default=0.95, show_default=True, metavar="C", help="With which the budget must hold.")
@click.option("--data", type=file_path(), metavar="DIR", help="Evaluate on these images afterwards; the record gets an entry.")
@with_labels
@with_weights
@with_class_map
@click.option(
    "--criterion",
    type=click.Choice(["kl", "ce", "heart"]),
    default="kl",
    show_default=True,
    help="What prices a cut: kl needs no labels; ce and heart do.",
)
@click.option("--temperature", type=float, default=4.0, show_default=True, metavar="T", help="On the logits, for the criterion kl.")
@click.option("--draws", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Fisher samples or probes per image.")
@click.option("--tokens/--no-tokens", default=True, show_default=True, help="Whether tokens may go.")
@click.option(
    "--heads",
    type=click.Choice(["none", "static", "adaptive"]),
    default="static",
    show_default=True,
    help="Whether heads may go: for good, or sit out image by image.",
)
@click.option("--combine", type=click.Choice(["merge", "drop"]), default="merge", show_default=True, help="What becomes of removed tokens.")
@click.option(
    "--counts",
    type=click.Choice(["adaptive", "fixed"]),
    default="adaptive",
    show_default=True,
    help="As many tokens as each image can spare, or the same number for all.",
)
@click.option(
    "--schedule",
    type=click.Choice(["asymmetric", "symmetric"]),
    default="asymmetric",
    show_default=True,
    help="Cut each block as it can bear, or all by the same share.",
)
@click.option(
    "--blocks",
    type=click.Choice(["auto", *BLOCKS]),
    default="auto",
    show_default=True,
    help="Which blocks let tokens go: every, every other or every third one, or one; to 5/6 of the depth, early or middle. auto measures.",
)
@click.option("--rank", type=click.IntRange(1), default=24, show_default=True, metavar="R", help="Dimensions of the curvature metric.")
@click.option("--gamma", type=float, default=0.35, show_default=True, metavar="G", help="Power of the token curvature.")
@click.option(
    "--rounds",
    type=AutoOr(1, 8),
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Rounds of matching in a decision to merge. auto measures 1 and 2, in sets of every other or third block.",
)
@click.option(
    "--multiple",
    type=AutoOr(1),
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Of which adaptive counts are multiples, so that images of a batch have equal ones (1: any). auto: 8 for 197 tokens, "
    "up to 16 for more, less for fewer; with a budget on this device where its steps are.",
)
@click.option(
    "--refit/--no-refit",
    default=True,
    show_default=True,
    help="Fit prices of merging under kl again where the model is cut; kept where they lower the drift (not under 64 fitting images).",
)
@click.option(
    "--refine",
    type=click.IntRange(0, 100),
    default=5,
    show_default=True,
    metavar="EPOCHS",
    help="Passes over fitting images that learn what merged tokens get back (0: none; under 384 calibration images none either).",
)
@with_batch_size
@with_device
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N", help="For all that is random.")
@with_json
def prune(**options: Any) -> None:
    """Prune MODEL, a timm name or hf:NAME, within a budget, and write a run folder: plan, weights, record and report.

    Exactly one budget is needed. It is verified on calibration images that fitted nothing, and --latency, --latency-ms and --energy on
    the device besides, with nothing else running there. No weight of the network is trained.
    """
    budget_kind = _budget_kind(options)
    with Stages() as stages:
        stages("Open model and images", 0, 0)
        from hesper import api

        run = api.prune(
            options["model"],
            calib=options["calib"],
            out=options["out"],
            settings=_settings(options, budget_kind),
            weights=options["weights"],
            class_map=options["class_map"],
            data=options["data"],
            labelled=options["labels"],
            device=options["device"],
            meter=options["meter"],
            asked=_asked(options),
            progress=stages,
            note=stages.say,
        )
    if not leads():
        return
    write_report_in(run)
    for warning in run.entries[0].results.get("check_warnings", ()):
        click.echo(f"hesper: {warning}", err=True)
    print_skipped([(skip["file"], skip["reason"]) for entry in run.entries for skip in entry.results["skipped"]])
    _tell(run, options["json_"])


def write_report_in(run: RunFolder) -> None:
    """Put ``report.html`` into a finished run folder; whatever stops that, the run is complete."""
    from hesper.report import write_report
    from hesper.runs import REPORT, once_written

    with once_written(f"the run {run.path} is complete but for its report, which 'hesper report {run.path} --out report.html' makes"):
        write_report([run.path], run.path / REPORT)


def summary(run: RunFolder) -> dict[str, Any]:
    """A run's first figures, flat, for --json; those of the evaluation on --data are under ``data``."""
    from hesper.plan import plan_hash

    first, later = run.entries[0], [entry for entry in run.entries[1:] if entry.kind == "eval"]
    measured, expected = run.plan.measured, run.plan.expected_loss
    return {
        "run": str(run.path),
        "plan": plan_hash(run.plan),
        "statement": None if measured is None else measured.statement,
        "macs_ratio": None if measured is None else measured.macs.mean,
        "drift_kl": None if measured is None else measured.drift_kl.mean,
        "agreement": None if measured is None else measured.agreement.mean,
        "expected_loss": None if expected is None else expected.mean,
        "device": None if run.plan.device is None else dataclasses.asdict(run.plan.device),
        "heads_removed": sum(len(cut.remove) for cut in run.plan.heads),
        "blocks_gated": len(run.plan.gates),
        "improvements": first.results.get("improvements"),
        "skipped": sum(len(entry.results["skipped"]) for entry in run.entries),
        "seconds": first.results["seconds"],
        "data": later[0].results["evaluation"] if later else None,
    }


def _tell(run: RunFolder, json_: bool) -> None:
    from hesper.cli.eval import table
    from hesper.plan.show import render
    from hesper.runs import REPORT

    if json_:
        click.echo(as_json(summary(run)))
        return
    click.echo(render(run.plan, declined(run)))
    if len(run.entries) > 1:
        click.echo(table(run.entries[1].results["evaluation"]))
    click.echo(f"Run     {run.path}\nReport  {run.path / REPORT}")


def _budget_kind(options: dict[str, Any]) -> str:
    given = [kind for kind, option in BUDGETS.items() if options[option.strip("-").replace("-", "_")] is not None]
    if len(given) != 1:
        names = ", ".join(BUDGETS[kind] for kind in given)
        what = f"{names} were given together" if given else "No budget was given"
        raise UsageError(
            f"{what}; give exactly one budget: --macs RATIO, --latency RATIO, --latency-ms MS, "
            "--energy RATIO, --loss-budget NATS or --max-disagreement P."
        )
    return given[0]


def _settings(options: dict[str, Any], kind: str) -> Settings:
    from hesper.heart.criteria import Criterion
    from hesper.heart.settings import Settings

    tokens = ("combine", "counts", "schedule", "tokens", "rank", "gamma", "rounds", "multiple", "refit", "refine", "blocks")
    plain = (*tokens, "heads", "batch_size", "seed", "device_batch", "device_runtime")
    budget = _budget(options, kind)
    _check_asked(options, budget)
    criterion = Criterion(options["criterion"], options["temperature"], options["draws"])
    return Settings(budget, criterion, **{name: options[name] for name in plain})


def _check_asked(options: dict[str, Any], budget: Budget) -> None:
    """Refuse what was asked for in so many words and would have no effect."""
    from hesper.plan import on_device

    tokens, merges, adapts = bool(options["tokens"]), options["combine"] == "merge", options["counts"] == "adaptive"
    rules = (
        (("rounds", "refine"), tokens and merges, "merging tokens", "--tokens --combine merge"),
        (("refit",), tokens and merges and options["criterion"] == "kl", "merging tokens", "--tokens --combine merge --criterion kl"),
        (("multiple",), tokens and adapts, "counts that adapt", "--tokens --counts adaptive"),
        (("device_batch", "device_runtime"), on_device(budget), "a budget on this device", "--latency, --latency-ms or --energy"),
        (("meter",), budget.kind == "energy", "a budget on energy", "--energy"),
    )
    source = click.get_current_context().get_parameter_source
    for names, possible, subject, needed in rules:
        for name in names:
            asked = source(name) is click.core.ParameterSource.COMMANDLINE and options[name] not in (False, 0, "auto")
            if asked and not possible:
                raise UsageError(f"--{name.replace('_', '-')} is about {subject} and needs {needed}; leave it out.")


def _budget(options: dict[str, Any], kind: Any) -> Budget:
    from hesper.plan import Budget

    return Budget(kind, options[BUDGETS[kind].strip("-").replace("-", "_")], options["confidence"])


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, in plain values, and as a command that asks for it again."""
    plain = {name.rstrip("_"): str(value) if isinstance(value, Path) else value for name, value in options.items() if name != "json_"}
    return {"command": _command(), **plain}


def _command() -> str:
    """This verb's command line, defaults left out."""
    context = click.get_current_context()
    words = ["hesper", "prune", str(context.params["model"])]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        source = context.get_parameter_source(name)
        if not isinstance(parameter, click.Option) or source is not click.core.ParameterSource.COMMANDLINE or name == "json_":
            continue
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)
