from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cli_helpers import hesper, sentence
from hesper.demo import Story, story, tell
from hesper.demo.digits import PARTS, SIDE, write_digits
from hesper.demo.train import SMALL, train, untrained
from hesper.errors import UsageError
from hesper.hosts import open_host
from hesper.runs import open_run


def test_digits_are_divided_into_disjoint_parts_of_real_images(tmp_path: Path) -> None:
    written = write_digits(tmp_path, seed=0)
    files = {part: [path.name for path in (tmp_path / part).rglob("*.png")] for part in PARTS}
    assert {part: len(names) for part, names in files.items()} == written == {"train": 1078, "calib": 360, "test": 359}
    assert len({name for names in files.values() for name in names}) == 1797
    path = next((tmp_path / "test").rglob("*.png"))
    digit = load_digits()
    number = int(path.stem)
    assert path.parent.name == str(digit.target[number])
    with Image.open(path) as image:
        assert image.size == (SIDE, SIDE)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
    assert np.corrcoef(small.ravel(), digit.images[number].ravel())[0, 1] > 0.98


def test_the_seed_decides_the_parts(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_digits(tmp_path / name, seed=seed, most=150)
    listed = [sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.png")) for name in "abc"]
    assert listed[0] == listed[1] != listed[2]


def test_too_few_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        write_digits(tmp_path, seed=0, most=20)


def test_the_small_model_has_the_shape_it_says_and_its_seed_is_its_own() -> None:
    before = torch.random.get_rng_state()
    first, again, other = untrained(0), untrained(0), untrained(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert open_host(first.eval()).anatomy == SMALL
    assert torch.equal(first.head.weight, again.head.weight) and not torch.equal(first.head.weight, other.head.weight)
    places = first.pos_embed[0, 1:]
    assert len(torch.unique(places, dim=0)) == 64


def test_training_learns_and_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randn(48, 3, SIDE, SIDE, generator=generator) * 0.1 + (labels * 2.0 - 1)[:, None, None, None]
    steps: list[tuple[int, int]] = []
    models = [untrained(0), untrained(0)]
    for model in models:
        train(model, images, labels, epochs=4, seed=0, progress=lambda done, total: steps.append((done, total)))
    assert steps[:8] == [(step, 8) for step in range(1, 9)]
    assert (models[0](images).argmax(1) == labels).all()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert not models[0].training and not any(p.requires_grad for p in models[0].parameters())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Story]:
    """A short version of the demo: few digits, one epoch, so its model knows next to nothing."""
    out = tmp_path_factory.mktemp("demo") / "digits"
    return out, tell(out, epochs=1, digits=200)


def test_the_story_leaves_everything_in_its_folder(told: tuple[Path, Story]) -> None:
    out, found = told
    assert sorted(path.name for path in out.iterdir()) == ["data", "digits_vit.safetensors", "run"]
    assert [path.name for path in out.parent.iterdir()] == ["digits"]
    kinds = [entry.kind for entry in open_run(out / "run").entries]
    assert kinds == ["prune", "eval", "timing"] and (out / "run" / "report.html").is_file()
    assert found.evaluation["n"] == found.images["test"] == 40
    assert len(found.timing.a) == len(found.timing.b) == story.ROUNDS


def test_nothing_in_the_folder_names_the_temporary_one(told: tuple[Path, Story]) -> None:
    for name in ("record.json", "plan.toml", "report.html"):
        assert ".partial" not in (told[0] / "run" / name).read_text(encoding="utf-8")


def test_its_run_is_evaluated_like_any_other(told: tuple[Path, Story]) -> None:
    result = hesper("eval", told[0] / "run", "--data", told[0] / "data" / "test", "--json")
    assert result.exit_code == 0, result.stderr
    again, first = json.loads(result.stdout), told[1].evaluation
    assert (again["n"], again["top1"], again["macs_mean"]) == (first["n"], first["top1"], first["macs_mean"])


def test_the_command_tells_the_story(told: tuple[Path, Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesper.demo.tell", lambda out, **_: told[1])
    said = hesper("demo", "--out", tmp_path / "new").stdout
    assert "times as fast" in said and "accuracy" in said and str(told[0] / "run" / "report.html") in said
    found = json.loads(hesper("demo", "--out", tmp_path / "new", "--json").stdout)
    assert found["out"] == str(told[0]) and len(found["timing"]["a"]) == story.ROUNDS


def test_an_existing_folder_is_refused_with_another_name(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    assert f"--out {tmp_path / 'taken'}-2" in sentence(hesper("demo", "--out", tmp_path / "taken"), 2)


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "train", interrupted)
    assert sentence(hesper("demo", "--out", tmp_path / "sub" / "new"), 1) == "interrupted; nothing was written."
    assert list(tmp_path.iterdir()) == []
