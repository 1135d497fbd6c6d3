"""Budgets on this device, as a user asks for them: met and told in the plan, the record and the report, or refused in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from cli_helpers import NAME, QUICK, hesper, sentence
from hesper.runs import open_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One process a check, and staircases of this test alone."""
    monkeypatch.setattr("hesper.benchmark.this_device.PROCESSES", 1)
    monkeypatch.setattr("hesper.heart.device.CHECKS", 1)
    monkeypatch.setattr("hesper.measure.stairs.ROUNDS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_a_budget_of_latency_is_measured_and_told(tmp_path: Path, weights: Path, images: Path) -> None:
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--latency", 0.97, "--device-batch", 64)
    assert result.exit_code == 0, result.stderr
    run = open_run(out)
    device, budget = run.plan.device, run.plan.budget
    assert (budget.kind, budget.value) == ("latency", 0.97) and device is not None and device.batch_size == 64
    assert device.low <= device.measured <= device.high and device.foretold == device.expected <= 0.975
    assert (
        run.plan.measured is not None
        and f"Takes {device.measured:.4g} of the dense model's time for 64 images" in run.plan.measured.statement
    )
    (check,) = run.entries[0].results["checks"]
    assert check["measured"] == device.measured
    shown = hesper("show", out).stdout
    assert "at most 0.97 of the dense model's time" in shown and "device    64 images" in shown and max(map(len, shown.splitlines())) <= 80
    page = (out / "report.html").read_text()
    assert (
        re.search("take 97.0.% of the dense model’s time on the device", page.replace("&nbsp;", " "))
        and "foretold by its staircase" in page
    )
    assert json.loads(hesper("bench", out, "--meter", "none", "--processes", 1, "--rounds", 3, "--json").stdout)["cells"]


def test_energy_is_that_of_the_meter(tmp_path: Path, weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.benchmark.this_device.STRETCH_SECONDS", 0.5)
    power = tmp_path / "power.csv"
    power.write_text("seconds,watts\n0,7\n6000,7\n")
    out = tmp_path / "run"
    words = ("--weights", weights, "--calib", images, "--out", out, "--refine", 0, "--no-refit", *QUICK)
    result = hesper("prune", NAME, *words, "--energy", 0.97, "--device-batch", 64, "--meter", f"replay:{power}")
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
    ],
)
def test_wrong_budgets_are_refused(ask: Callable[..., Result], words: tuple[object, ...], says: str) -> None:
    assert says in sentence(ask(*words), 2)


def test_what_the_device_cannot_do_is_said_with_what_it_can(ask: Callable[..., Result]) -> None:
    said = sentence(ask("--latency-ms", 0.001), 1)
    assert re.search(
        r"No plan takes 0.001 ms here, where the dense model takes \d[\d.]* ms; the least that can be had is \d[\d.]* ms", said
    )


def test_batches_that_do_not_fit_are_refused(ask: Callable[..., Result]) -> None:
    assert "do not fit into this device's memory; use a smaller --device-batch" in sentence(
        ask("--latency", 0.7, "--device-batch", 10**8), 1
    )
