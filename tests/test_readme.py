"""The README keeps its word: its commands and its Python run as they stand, on a small model, and it names every room."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from cli_helpers import CLASSES, NAME, hesper, write_images, write_weights
from hesper.runs import open_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def blocks(language: str) -> list[str]:
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S) if kind == language]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's examples name; "pretrained" weights come from a file instead of the network."""
    weights = load_file(write_weights(tmp_path / "w.safetensors"))

    def pretrained(name: str) -> torch.nn.Module:
        module = timm.create_model(name, num_classes=len(CLASSES))
        module.load_state_dict(weights)
        return module

    monkeypatch.setattr("hesper.hosts.open_timm.pretrained", pretrained)
    write_images(tmp_path / "images", 8)
    write_images(tmp_path / "val", 4, seed=1)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(home: Path) -> None:
    commands = [line.split("#")[0] for block in blocks("") for line in block.splitlines() if line.startswith("hesper ")]
    assert [shlex.split(command)[1] for command in commands] == ["prune", "show", "eval", "report", "bench", "export"]
    for command in commands:
        assert LARGE in command or "prune" not in command
        result = hesper(*shlex.split(command.replace(LARGE, NAME))[1:])
        assert result.exit_code == 0, (command, result.stderr)
    assert [entry.kind for entry in open_run(home / "run").entries] == ["prune", "eval", "bench", "export"]
    assert (home / "report.html").stat().st_size > 10_000


def test_the_python_runs(home: Path) -> None:
    (block,) = blocks("python")
    assert LARGE in block
    names: dict[str, object] = {}
    exec(block.replace(LARGE, NAME), names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert model(torch.zeros(2, 3, 160, 160)).shape == (2, len(CLASSES))
    assert open_run(home / "run").plan.budget.value == 0.66


def test_every_option_named_is_an_option() -> None:
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - {"--nproc-per-node"}  # torchrun's own
    assert {"--macs", "--loss-budget", "--max-disagreement", "--confidence"} <= options
    verbs = ("prune", "eval", "bench", "compare", "export", "show", "report", "doctor", "demo")
    told = "".join(hesper(verb, "--help").stdout for verb in verbs)
    assert {option for option in options if not re.search(rf"{option}\b", told)} == set()


def test_every_room_is_on_the_map() -> None:
    tree = next(block for block in blocks("") if block.startswith("src/hesper/"))
    rooms = {path.name for path in (ROOT / "src" / "hesper").iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")}
    named = set(re.findall(r"(\w+\.py)\b", tree)) | set(re.findall(r"\b(\w+)/", tree)) - {"src", "hesper"}
    assert named == rooms


def test_every_link_and_picture_is_there() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert any(target.endswith(".png") for target in targets)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
