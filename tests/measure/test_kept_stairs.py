from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hesper.graft.pieces import Decision
from hesper.measure.fingerprint import Fingerprint
from hesper.measure.kept_stairs import folder_of_stairs, kept_or_measured
from hesper.measure.stairs import Stairs
from hesper.plan import Anatomy, ModelRef

REF = ModelRef("tiny", "timm", "ab" * 32, Anatomy(12, 192, 3, 64, 768, 197, 1, 1000, 768, (224, 224), (14, 14), False))
MACHINE = Fingerprint({"cpu": "A78", "torch": "2.6"}, {"busy": 0.0})
STAIRS = Stairs(1, True, (2, 197), (1.0, 2.0), (0.5, 1.0), (0.1, 0.2), (2, 197), {"1": (0.0, 0.1)}, (1, 3), (0.2, 1.0), 0.5, 20.0)


class Measure:
    """Gives another staircase every time it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Stairs:
        self.times += 1
        return dataclasses.replace(STAIRS, dense=20.0 + self.times)


def ask(folder: Path, measure: Measure, **other: object) -> Stairs:
    asked = {"machine": MACHINE, "ref": REF, "device": "cpu", "batch_size": 1, "decisions": [Decision("merge")], **other}
    return kept_or_measured(**asked, measure=measure, folder=folder)  # type: ignore[arg-type]


def test_what_was_measured_once_is_not_measured_again(tmp_path: Path) -> None:
    measure = Measure()
    first = ask(tmp_path, measure)
    assert ask(tmp_path, measure) == first and measure.times == 1
    assert ask(tmp_path, measure, ref=dataclasses.replace(REF, weights_sha256="cd" * 32)) == first  # weights do not matter


@pytest.mark.parametrize(
    "other",
    [
        {"machine": Fingerprint({"cpu": "A57", "torch": "2.6"}, {})},
        {"device": "cuda"},
        {"batch_size": 8},
        {"decisions": [Decision("merge", 2)]},
        {"decisions": [Decision("merge", adaptive=True)]},
        {"runtime": "ONNX Runtime 1.32.0, CPUExecutionProvider"},
        {"ref": dataclasses.replace(REF, name="other")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_machine_model_or_batch_is_measured_on_its_own(tmp_path: Path, other: dict[str, object]) -> None:
    measure = Measure()
    assert ask(tmp_path, measure) != ask(tmp_path, measure, **other) and measure.times == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": {}, "stairs": {}}', "null"])
def test_what_is_damaged_is_measured_again(tmp_path: Path, text: str) -> None:
    measure = Measure()
    ask(tmp_path, measure)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert ask(tmp_path, measure).dense == 22.0 and ask(tmp_path, measure).dense == 22.0


def test_what_a_busy_machine_measured_is_not_kept(tmp_path: Path) -> None:
    measure = Measure()
    ask(tmp_path, measure, keep=False)
    assert list(tmp_path.iterdir()) == [] and ask(tmp_path, measure).dense == 22.0


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert ask(tmp_path / "file" / "stairs", Measure()).dense == 21.0


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of_stairs() == tmp_path / "hesper" / "stairs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder_of_stairs() == Path.home() / ".cache" / "hesper" / "stairs"


def test_a_user_without_a_home_measures_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    measure = Measure()
    assert folder_of_stairs() is None
    for times in (1, 2):
        kept_or_measured(MACHINE, REF, "cpu", 1, [Decision("merge")], measure)
        assert measure.times == times
