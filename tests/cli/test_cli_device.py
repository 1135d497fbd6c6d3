"""Budgets on this device, as a user asks for them: met and told in the plan, the record and the report, or refused in a sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import Tensor

from cli_helpers import NAME, QUICK, hesper, sentence, write_images
from hesper.benchmark import launch
from hesper.benchmark.this_device import ThisDevice
from hesper.graft import GraftedViT
from hesper.graft.graph_pieces import GraphPieces
from hesper.graft.pieces import Decision
from hesper.heart.device import Check
from hesper.heart.prune import _Job
from hesper.hosts.open import OpenModel
from hesper.measure.evaluate import evaluate
from hesper.measure.stairs import Stairs, TakeApart
from hesper.runs import open_run

REHEARSE = _Job._rehearse


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One check of one process, and none before; the staircase is one of tokens alone, as a model of no width has none of its own."""
    monkeypatch.setattr("hesper.benchmark.this_device.PROCESSES", 1)
    monkeypatch.setattr("hesper.benchmark.this_device.measure_stairs", tokens_alone)
    monkeypatch.setattr("hesper.heart.device.CHECKS", 1)
    monkeypatch.setattr(_Job, "_rehearse", lambda *_: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tokens_alone(model: OpenModel, images: Tensor, decisions: Sequence[Decision], **_: object) -> Stairs:
    anatomy = model.ref.anatomy
    counts, nothing = (2, anatomy.tokens), (0.0, 0.0)
    heads = (1, anatomy.heads)
    blocks = tuple(1e-3 * count / anatomy.tokens for count in counts)
    deciding = {str(decision.rounds): nothing for decision in decisions}
    dense = 1e-3 * anatomy.depth
    return Stairs(len(images), True, counts, blocks, nothing, nothing, counts, deciding, heads, (1e-3, 1e-3), 1e-3, dense)


def test_a_budget_of_latency_is_measured_and_told(tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--latency", 0.8, "--device-batch", 4)
    assert result.exit_code == 0, result.stderr
    run = open_run(out)
    device, budget = run.plan.device, run.plan.budget
    assert (budget.kind, budget.value) == ("latency", 0.8) and device is not None and device.batch_size == 4
    assert device.low <= device.measured <= device.high and 0.7 < device.foretold == device.expected <= 0.81
    assert (
        run.plan.measured is not None
        and f"akes {device.measured:.4g} of the dense model's time for 4 images" in run.plan.measured.statement
    )
    (check,) = run.entries[0].results["checks"]
    assert check["measured"] == device.measured
    shown = hesper("show", out).stdout
    assert "at most 0.8 of the dense model's time" in shown and "device    4 images" in shown and max(map(len, shown.splitlines())) <= 80
    page = (out / "report.html").read_text()
    assert (
        re.search("take 80.0.% of the dense model’s time on the device", page.replace("&nbsp;", " "))
        and "foretold by its staircase" in page
    )
    assert json.loads(hesper("bench", out, "--meter", "none", "--processes", 1, "--rounds", 3, "--json").stdout)["cells"]


def test_a_device_that_is_slower_than_foretold_is_known_before_the_search(
    tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(self: ThisDevice, model: GraftedViT) -> Check:
        evaluation, stairs = evaluate(model, self.opened.host.module, self.timed), self.machine.stairs
        share = 1.2 * float(stairs.seconds(model.plan, evaluation.tokens, evaluation.heads).mean()) / stairs.dense
        return Check(share, share, share, 1, evaluation)

    monkeypatch.setattr(_Job, "_rehearse", REHEARSE)
    monkeypatch.setattr(ThisDevice, "check", slower)
    words = ("--weights", weights, "--calib", images, "--refine", 0, "--no-refit", *QUICK, "--latency")
    result = hesper("prune", NAME, *words, 0.85, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    first, last = open_run(tmp_path / "run").entries[0].results["checks"]
    assert first["foretold"] == first["expected"] > 0.7 and first["measured"] == pytest.approx(1.2 * first["foretold"])
    assert last["expected"] == pytest.approx(last["measured"]) and 0.7 < last["measured"] < 0.86
    # In reach of what is foretold, and not of what the device takes.
    least = float(
        re.findall(r"the least that can be had is (\d\.\d+)", sentence(hesper("prune", NAME, *words, 0.2, "--out", tmp_path / "no"), 1))[0]
    )
    said = sentence(hesper("prune", NAME, *words, 1.1 * least, "--out", tmp_path / "no"), 1)
    assert "No plan takes" in said and float(re.findall(r"had is (\d\.\d+)", said)[0]) == pytest.approx(1.2 * least, rel=0.02)


def test_a_budget_may_be_about_onnx_runtime(tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def stairs(model: OpenModel, shots: Tensor, decisions: Sequence[Decision], *, pieces: TakeApart, **_: object) -> Stairs:
        taken.append(pieces(model.host.module, model.ref, decisions[0]))
        return tokens_alone(model, shots, decisions)

    monkeypatch.setattr("hesper.benchmark.this_device.measure_stairs", stairs)
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--latency", 0.8, "--device-runtime", "onnx")
    assert result.exit_code == 0, result.stderr
    run = open_run(out)
    device = run.plan.device
    assert device is not None and ", ONNX Runtime " in device.device and device.device.endswith("CPUExecutionProvider")
    assert device.unit == "of the dense model's time" and 0.1 < device.measured < 10
    assert "--device-runtime onnx" in run.entries[0].asked["command"]
    assert [type(each) for each in taken] == [GraphPieces] and taken[0].decision.adaptive


def test_energy_is_that_of_the_meter(tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.benchmark.this_device.STRETCH_SECONDS", 0.5)
    power = tmp_path / "power.csv"
    power.write_text("seconds,watts\n0,7\n6000,7\n")
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--energy", 0.8, "--meter", f"replay:{power}")
    assert result.exit_code == 0, result.stderr
    device = open_run(out).plan.device
    assert device is not None and device.unit == "of the dense model's energy" and 0.1 < device.measured < 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--latency", 0), "must lie above 0 and be at most 1, not 0"),
        (("--latency", 1.5), "must lie above 0 and be at most 1, not 1.5"),
        (("--latency-ms", -3), "must be above 0 ms, not -3"),
        (("--energy", "nan"), "must lie above 0 and be at most 1"),
        (("--latency", 0.7, "--macs", 0.7), "--macs, --latency were given together"),
        (("--macs", 0.7, "--device-batch", 4), "--device-batch is about a budget on this device and needs --latency"),
        (("--latency", 0.7, "--meter", "rapl"), "--meter is about a budget on energy and needs --energy"),
        (("--energy", 0.7, "--meter", "none"), "No energy can be read here (none was asked for)"),
        (("--energy", 0.7, "--meter", "wattmeter"), "There is no meter 'wattmeter'"),
        (("--latency", 0.7, "--device-batch", 0), "--device-batch"),
        (("--macs", 0.7, "--device-runtime", "onnx"), "--device-runtime is about a budget on this device and needs --latency"),
        (("--latency", 0.7, "--device-runtime", "tflite"), "--device-runtime"),
        (("--latency", 0.7, "--device-runtime", "onnx", "--heads", "adaptive"), "use --heads static, or --device-runtime torch"),
        (("--latency", 0.7, "--device-runtime", "onnx", "--device-batch", 4), "use --counts fixed, or --device-batch 1"),
    ],
)
def test_wrong_budgets_are_refused(ask: Callable[..., Result], words: tuple[object, ...], says: str) -> None:
    assert says in sentence(ask(*words), 2)


def test_what_the_device_cannot_do_is_said_with_what_it_can(ask: Callable[..., Result]) -> None:
    said = sentence(ask("--latency-ms", 0.001), 1)
    assert re.search(
        r"No plan takes 0.001 ms here, where the dense model takes \d[\d.]* ms; the least that can be had is \d[\d.]* ms", said
    )


def test_what_the_dense_model_does_already_is_no_budget(ask: Callable[..., Result]) -> None:
    assert re.search(r"The dense model takes \d[\d.]* ms here already, so 1e\+06 ms is no budget", sentence(ask("--latency-ms", 1e6), 2))


def test_batches_that_do_not_fit_are_refused(ask: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object, **__: object) -> Stairs:
        return torch.empty(2**60)  # type: ignore[return-value]

    monkeypatch.setattr("hesper.benchmark.this_device.measure_stairs", starved)
    assert "Batches of 9 images do not fit into this device's memory" in sentence(ask("--latency", 0.7, "--device-batch", 9), 1)


def test_a_check_that_fails_loses_nothing(tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    words = ("prune", NAME, "--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK, "--latency", 0.8)
    with monkeypatch.context() as broken:
        broken.setattr(launch, "COMMAND", (sys.executable, "-c", "raise ValueError('no such layer')"))
        said = sentence(hesper(*words), 1)
    assert "could not be measured on this device: crashed (ValueError: no such layer); run the same command again" in said
    assert not out.exists() and (tmp_path / ".run.work").is_dir()
    again = hesper(*words)
    assert again.exit_code == 0 and "Goes on with the work of an earlier process" in again.stderr and open_run(out).plan.device is not None


def test_one_file_that_is_no_image_refuses_nothing(tmp_path: Path, weights: Path) -> None:
    calib = write_images(tmp_path / "calib", 8)
    (calib / "ant" / "00.png").write_bytes(b"no image")  # the first of all
    words = ("--weights", weights, "--calib", calib, "--out", tmp_path / "run", "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--latency", 0.8)
    assert result.exit_code == 0, result.stderr
