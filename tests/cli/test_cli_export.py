"""Exporting real runs to real files, and running these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result

import hesper as package
from cli_helpers import NAME, QUICK, hesper, sentence
from hesper.exporting import Notes, format_of
from hesper.exporting.notes import KEY
from hesper.exporting.onnx_session import bound
from hesper.exporting.tensorrt import refused_by_tensorrt
from hesper.heart.gallery import GALLERY
from hesper.runs import open_run

FAST = ("--threads", 1, "--rounds", 3, "--processes", 1, "--meter", "none")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, weights: Path, images: Path) -> Path:
    """A run of fixed counts."""
    out = tmp_path_factory.mktemp("fixed") / "run"
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--macs", 0.8, "--counts", "fixed", "--out", out, *QUICK)
    result = hesper(*words)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def onnx_file(fixed: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "fixed.onnx"
    result = hesper("export", fixed, "--out", file, "--data", images)
    assert result.exit_code == 0, result.stderr
    assert "100.00 % equal top-1 on 24 images" in result.stdout and "takes every operator" in result.stdout
    return file


def pictures_for(run: Path, count: int) -> torch.Tensor:
    size = open_run(run).plan.model.anatomy.image_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def test_a_fixed_run_takes_any_batch_in_onnx_runtime_without_hesper(fixed: Path, onnx_file: Path) -> None:
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    cut, images = package.load(fixed), pictures_for(fixed, 5)
    for count in (1, 2, 5):
        (logits,) = session.run(["logits"], {"images": images[:count].numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(logits, cut(images[:count]).numpy(), rtol=1e-3, atol=1e-3)
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    assert refused_by_tensorrt(model) == [] and not any("Scatter" in node.op_type for node in model.graph.node)
    notes = Notes.loads({item.key: item.value for item in model.metadata_props}[KEY], onnx_file)
    assert notes.largest_batch is None and 0.5 < notes.macs / notes.macs_dense < 0.85


def test_images_that_are_on_a_device_stay_there(fixed: Path, onnx_file: Path) -> None:
    """By a binding of memory, tried on the processor's: the same logits, written where they are asked for."""
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    run, images = bound(session, (open_run(fixed).plan.model.anatomy.classes,)), pictures_for(fixed, 5)
    for part in (images, images.transpose(2, 3)[:2]):
        (logits,) = session.run(["logits"], {"images": part.contiguous().numpy()})
        np.testing.assert_array_equal(run(part).numpy(), logits)


def test_the_export_is_in_the_record(fixed: Path, onnx_file: Path) -> None:
    entry = next(entry for entry in open_run(fixed).entries if entry.kind == "export")
    assert entry.results["parity"]["images"] == 24 and entry.results["parity"]["max_error"] < 1e-3
    assert entry.files.keys() == {onnx_file.name} and entry.results["details"]["opset"] == 20


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_adaptive_run_goes_one_image_at_a_time(pruned: tuple[Path, Result], tmp_path: Path, suffix: str) -> None:
    run = shutil.copytree(pruned[0], tmp_path / "run")
    file = tmp_path / f"adaptive{suffix}"
    result = hesper("export", run, "--out", file, "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["notes"]["largest_batch"] == 1 and made["parity"]["agreement"] == 1.0
    runner, cut, images = format_of(file).open(file, "cpu", None, 1), package.load(run), pictures_for(run, 8)
    images = images * torch.linspace(0.02, 1, 8)[:, None, None, None]
    with torch.inference_mode():
        counts = {tuple(cut.run(image[None]).traffic.fed[0].tolist()) for image in images}
        found = torch.cat([runner.run(image[None]) for image in images])
        torch.testing.assert_close(found, cut(images), rtol=1e-3, atol=1e-3)
    assert len(counts) > 1
    assert "one image at a time" in sentence(hesper("bench", file, "--batch-size", 2, *FAST), 2)
    assert "give --data" in sentence(hesper("bench", file, *FAST), 2)


def test_an_archive_takes_any_batch(fixed: Path, tmp_path: Path) -> None:
    file = tmp_path / "fixed.pt2"
    assert hesper("export", fixed, "--out", file).exit_code == 0
    runner, cut, images = format_of(file).open(file, "cpu", None, None), package.load(fixed), pictures_for(fixed, 3)
    for count in (1, 3):
        with torch.inference_mode():
            torch.testing.assert_close(runner.run(images[:count]), cut(images[:count]), rtol=1e-3, atol=1e-3)


def test_an_executorch_program_runs_in_its_own_runtime(fixed: Path, pruned: tuple[Path, Result], tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    file = tmp_path / "fixed.pte"
    result = hesper("export", fixed, "--out", file)
    assert result.exit_code == 0, result.stderr
    runner, cut, images = format_of(file).open(file, "cpu", None, None), package.load(fixed), pictures_for(fixed, 2)
    with torch.inference_mode():
        found = torch.cat([runner.run(image[None]) for image in images])
        torch.testing.assert_close(found, cut(images), rtol=1e-3, atol=1e-3)
    assert file.stat().st_size < 3e6 and runner.notes.largest_batch == 1 and not runner.notes.adaptive
    assert "--counts fixed" in sentence(hesper("export", pruned[0], "--out", tmp_path / "adaptive.pte"), 2)


def test_halves_and_the_dense_model_are_exported_and_benched(fixed: Path, tmp_path: Path) -> None:
    half, dense = tmp_path / "half.onnx", tmp_path / "dense.onnx"
    for words in (("--out", half, "--precision", "fp16", "--opset", 18), ("--out", dense, "--dense")):
        result = hesper("export", fixed, *words)
        assert result.exit_code == 0, result.stderr
    assert half.stat().st_size < 0.75 * dense.stat().st_size
    result = hesper("bench", half, "--baseline", dense, "--batch-size", "1,2", "--json", *FAST)
    assert result.exit_code == 0, result.stderr
    for cell in json.loads(result.stdout)["cells"]:
        models = cell["models"]
        assert cell["ending"] == "done" and models["target"]["macs_mean"] < models["baseline"]["macs_mean"]
        assert models["target"]["runtime"].startswith("ONNX Runtime")


def test_a_file_is_benched_on_the_images_that_a_run_keeps(fixed: Path, onnx_file: Path, tmp_path: Path) -> None:
    result = hesper("bench", onnx_file, "--data", fixed, "--json", *FAST)
    assert result.exit_code == 0, result.stderr
    bare = shutil.copytree(fixed, tmp_path / "bare")
    (bare / GALLERY).unlink()
    said = sentence(hesper("bench", onnx_file, "--data", bare, *FAST), 2)
    assert f"The run {bare} keeps no images of 160 x 160 pixels; give --data a folder of images" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "run.bin"), "does not say the format"),
        (("--out", "run.onnx", "--format", "torch"), "ends in .pt2"),
        (("--out", "run.onnx", "--format", "onx"), "did you mean 'onnx'"),
        (("--out", "run.onnx", "--opset", 9), "Opset 9"),
        (("--out", "run.pt2", "--opset", 18), "Opsets are ONNX's"),
        (("--out", "no/such/folder/run.onnx"), "cannot be written"),
        (("--out", "run.onnx", "--data", "no/such/images"), "no/such/images"),
        (("--out", "run.onnx", "--weights", "a.safetensors"), "holds its own weights"),
        (("--out", "run.onnx", "--dial", "0.1"), "no dial"),
    ],
)
def test_wrong_exports_are_refused_and_leave_nothing(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in sentence(hesper("export", fixed, *words), 2)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(fixed: Path, onnx_file: Path) -> None:
    before = onnx_file.read_bytes()
    assert "exists already" in sentence(hesper("export", fixed, "--out", onnx_file), 2)
    assert onnx_file.read_bytes() == before


def test_a_file_that_computes_something_else_is_not_written(fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(fixed, tmp_path / "run")
    real = torch.onnx.export

    def wrong(graph: Any, *rest: Any, **how: Any) -> Any:
        head, right = graph.cut.network.head, graph.cut.network.head.weight
        head.weight = torch.nn.Parameter(-right, requires_grad=False)
        try:
            return real(graph, *rest, **how)
        finally:
            head.weight = right

    monkeypatch.setattr(torch.onnx, "export", wrong)
    assert "so it was not written" in sentence(hesper("export", run, "--out", tmp_path / "wrong.onnx"), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not any(entry.kind == "export" for entry in open_run(run).entries[len(open_run(fixed).entries) :])


def test_files_of_something_else_are_refused(fixed: Path, onnx_file: Path, tmp_path: Path) -> None:
    other = onnx.load(onnx_file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    assert "was not exported by hesper" in sentence(hesper("bench", tmp_path / "other.onnx", *FAST), 2)
    newer = onnx.load(onnx_file)
    newer.opset_import[0].version = 99
    onnx.save(newer, tmp_path / "newer.onnx")
    assert "cannot open" in sentence(hesper("bench", tmp_path / "newer.onnx", *FAST), 2)
    for name in ("noise.onnx", "noise.pt2", "noise.pte"):
        (tmp_path / name).write_bytes(b"noise" * 100)
        assert name in sentence(hesper("bench", tmp_path / name, *FAST), 2)
    assert "There is no file" in sentence(hesper("bench", tmp_path / "none.onnx", *FAST), 2)
    for words in (("--precision", "fp16"), ("--compile", "default")):
        assert "an exported file has its own" in sentence(hesper("bench", onnx_file, *words, *FAST), 2)
    assert "TensorrtExecutionProvider" in sentence(hesper("bench", onnx_file, "--provider", "tensorrt", *FAST), 2)
