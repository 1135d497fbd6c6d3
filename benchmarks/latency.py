"""Plans made for this device beside plans of a budget of MACs that take as long: is the target met, and which drifts less.

    python benchmarks/latency.py --data DATA --pairs LATENCY_RUN MACS_RUN [LATENCY_RUN MACS_RUN ...]

Every run is benched beside its dense model on images of DATA/imagenet/val, in batches of the size that the first of a pair was made for,
the two of a pair are benched beside each other, and both are evaluated on all images of DATA/imagenet/val; pairs whose first was made for
ONNX Runtime are exported and benched there. One JSON object a line. Let nothing else run meanwhile. Takes six minutes a pair on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import Place, say

import hesper
from hesper.exporting import export
from hesper.runs import environment, open_run


def share(run: Path, baseline: Path | None, size: int, images: Path) -> dict[str, Any]:
    """How much of the baseline's time a run takes, with its 95 % interval; of its dense model's where there is no baseline."""
    found = hesper.bench(run, baseline=baseline, batch_sizes=(size,), data=images, meter="none", rounds=max(10, 64 // size))
    (cell,) = found.cells
    compared = cell.compare()
    assert compared is not None, cell.reason
    ms = {name: round(1000 * each.latency.p50, 2) for name, each in cell.series.items()}
    return {
        "share": round(1 / compared.ratio, 4),
        "interval": [round(1 / compared.high, 4), round(1 / compared.low, 4)],
        "ms": ms,
        "warnings": list(found.warnings),
    }


def shares(mine: Path, other: Path, size: int, images: Path) -> dict[str, Any]:
    """Of both runs of a pair beside their dense model, and of the first beside the second, where the first was made to run."""
    if open_run(mine).entries[0].asked.get("device_runtime", "torch") == "torch":
        return {
            name: share(*pair, size, images)
            for name, pair in {"latency": (mine, None), "macs": (other, None), "pair": (mine, other)}.items()
        }
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "latency", "macs")}
        for name, run in {"dense": mine, "latency": mine, "macs": other}.items():
            export(run, out=files[name], dense=name == "dense")
        pairs = {"latency": (files["latency"], files["dense"]), "macs": (files["macs"], files["dense"])}
        pairs["pair"] = (files["latency"], files["macs"])
        return {name: share(*pair, size, images) for name, pair in pairs.items()}


def outcome(run: Path, images: Path) -> dict[str, Any]:
    """Drift, agreement, change of top-1 and MACs on validation images."""
    summary = hesper.evaluate(run, data=images).summary()
    return {
        name: summary[name] for name in ("n", "macs_ratio", "drift_kl", "drift_kl_stderr", "agreement", "top1_change", "top1_change_stderr")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True)
    asked = parser.parse_args()
    images = Place(asked.data).root / "imagenet" / "val"
    print(json.dumps({"environment": environment()}), flush=True)
    for mine, other in zip(asked.pairs[::2], asked.pairs[1::2], strict=True):
        plan = open_run(mine).plan
        assert plan.device is not None, f"{mine} was not made for a device"
        size = plan.device.batch_size
        times = shares(mine, other, size, images)
        results = {"latency": outcome(mine, images), "macs": outcome(other, images)}
        row = {"run": mine.name, "model": plan.model.name, "batch": size, "asked": plan.budget.value, "times": times, "outcomes": results}
        print(json.dumps(row), flush=True)
        say(f"{mine.name}: {times['latency']['share']}, drift {results['latency']['drift_kl']:.4g} and {results['macs']['drift_kl']:.4g}")


if __name__ == "__main__":
    main()
