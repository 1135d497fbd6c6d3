"""``hesper doctor``: what is available here, and why the rest is not."""

from __future__ import annotations

from typing import Any

import click

from hesper.cli.options import as_json, example, with_json

__all__ = ["doctor"]

OPTIONAL = {
    "transformers": "Hugging Face models",
    "datasets": "Hugging Face data sets",
    "onnx": "ONNX export",
    "onnxruntime": "checking exported ONNX files",
    "pynvml": "reading NVIDIA devices",
}


@click.command(short_help="Say what is available here, and why the rest is not.", epilog=example("hesper doctor --json"))
@with_json
def doctor(json_: bool) -> None:
    """Say what is available here: versions, devices, attention kernels, energy meters and optional packages, and why the rest is not."""
    found = examine()
    click.echo(as_json(found) if json_ else _table(found))


def examine() -> dict[str, Any]:
    """What is available here, in plain values."""
    from hesper.device import attention_kernels, cuda_device
    from hesper.meters import survey
    from hesper.runs import environment

    name, reason = cuda_device()
    return {
        "environment": environment(),
        "cuda": {"device": name, "why_not": reason or None},
        "attention": {device: attention_kernels(device) for device in ("cpu", *(["cuda"] if name else []))},
        "meters": {said.meter: {"usable": said.usable, "reason": said.reason, "scope": said.scope} for said in survey()},
        "optional": {package: {"version": _version(package), "for": use} for package, use in OPTIONAL.items()},
    }


def _version(package: str) -> str | None:
    """The installed version of an importable package, "unknown" where its metadata goes by another name."""
    from importlib import metadata, util

    if util.find_spec(package) is None:
        return None
    names = metadata.packages_distributions().get(package, [package])
    try:
        return metadata.version(names[0])
    except metadata.PackageNotFoundError:
        return "unknown"


def _table(found: dict[str, Any]) -> str:
    here, cuda = found["environment"], found["cuda"]
    governor = here["governor"] or "not shown by this system"
    rows = [(name, here[name] or "not installed") for name in ("hesper", "python", "torch", "timm", "numpy")]
    rows += [
        ("system", here["platform"]),
        *([("board", here["board"])] if here["board"] else []),
        ("CPU", f"{here['cpu'] or 'unknown'}; {here['cores']} cores, {here['threads']} threads, governor {governor}"),
        ("CUDA", cuda["device"] or f"none: {cuda['why_not']}"),
    ]
    for device, kernels in found["attention"].items():
        rows += [(f"attention on {device}", ", ".join(kernels) or "none")]
    for name, state in found["meters"].items():
        rows += [(f"meter {name}", f"{state['scope']}: {state['reason']}" if state["usable"] else f"none: {state['reason']}")]
    for package, state in found["optional"].items():
        rows += [(package, state["version"] or f"not installed; this version runs without it ({state['for']} will need it)")]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
