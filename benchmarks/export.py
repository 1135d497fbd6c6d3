"""Exported runs in ONNX Runtime beside PyTorch: parity on validation images, and speed-up against the dense model in either.

    python benchmarks/export.py --data DATA --runs RUN RUN --out FOLDER

Every run is exported to ONNX and compared with PyTorch on all images of DATA/imagenet/val, its dense model too; then both are timed in
turns, in PyTorch and in ONNX Runtime, alone and (fixed counts) in batches of 32; in ONNX Runtime beside the dense model as torch exports it
as well. One JSON object a line. Let nothing else run meanwhile. Takes eight minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import onnx
import torch
from common import Place, say

import hesper
from hesper.artefact import open_dense
from hesper.benchmark import Bench
from hesper.exporting import export
from hesper.exporting.onnx_format import ONNX
from hesper.exporting.onnx_session import drawn, packed
from hesper.runs import RunFolder, environment, open_run

LARGE = 32


def speeds(found: Bench) -> dict[str, Any]:
    """Median times in milliseconds, the speed-up with its interval, and that times the share of MACs, by batch size."""
    rows = {}
    for cell in found.cells:
        compared = cell.compare()
        assert compared is not None, cell.reason
        target, dense = cell.series["target"], cell.series["baseline"]
        share = target.macs / dense.macs
        rows[str(cell.batch_size)] = {
            "ms": [round(1000 * each.latency.p50, 2) for each in (target, dense)],
            "speedup": [round(value, 3) for value in (compared.ratio, compared.low, compared.high)],
            "macs": round(share, 4),
            "product": round(compared.ratio * share, 3),
        }
    return {**rows, "warnings": list(found.warnings)}


def plain(dense: Path) -> Path:
    """Beside the dense file that Hesper writes, the one that torch does."""
    return dense.with_name(f"torch-{dense.name}")


def as_torch_exports_it(run: RunFolder, dense: Path, path: Path) -> None:
    """The dense model of a run by torch's exporter alone, with the notes of the ``dense`` file that Hesper wrote, which a bench reads."""
    network, (height, width) = open_dense(run).host.module, run.plan.model.anatomy.image_size
    any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    model = drawn(network, (torch.zeros(2, 3, height, width),), ONNX.opset, ["images"], any_batch)
    for own in onnx.load(dense, load_external_data=False).metadata_props:
        model.metadata_props.add(key=own.key, value=own.value)
    path.write_bytes(packed(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to make for the exported files")
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    images = Place(asked.data).root / "imagenet" / "val"
    asked.out.mkdir(parents=True)
    print(json.dumps({"environment": environment()}), flush=True)
    for run in asked.runs:
        opened = open_run(run)
        plan = opened.plan
        pruned, dense = asked.out / f"{run.name}.onnx", asked.out / f"{plan.model.name}-{plan.model.weights_sha256[:8]}.onnx"
        made = export(run, out=pruned, data=images)
        if not dense.exists():
            export(run, out=dense, dense=True, data=images)
            as_torch_exports_it(opened, dense, plain(dense))
        sizes = (1, LARGE) if made.notes.largest_batch is None else (1,)
        how: dict[str, Any] = {"data": images, "meter": "none", "rounds": asked.rounds}
        row = {
            "run": run.name,
            "parity": {"agreement": made.parity.agreement, "max_error": made.parity.max_error, "images": made.parity.images},
            "tensorrt_refuses": made.details["tensorrt_refuses"],
            "onnxruntime": speeds(hesper.bench(pruned, baseline=dense, batch_sizes=sizes, **how)),
            "onnxruntime, beside torch's file": speeds(hesper.bench(pruned, baseline=plain(dense), batch_sizes=sizes, **how)),
            "torch": speeds(hesper.bench(run, batch_sizes=(1, LARGE), **how)),
        }
        print(json.dumps(row), flush=True)
        say(f"{run.name}: {row['parity']}")


if __name__ == "__main__":
    main()
