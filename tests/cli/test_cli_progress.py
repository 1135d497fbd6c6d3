from __future__ import annotations

import io

import pytest

from hesper.cli import progress
from hesper.cli.progress import Stages


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_stages(stages: Stages) -> None:
    with stages:
        stages("Open", 0, 0)
        for _ in range(3):
            for done in (0, 8, 16):
                stages("Search", done, 16)
        stages("Verify", 0, 4)


def test_elsewhere_than_on_a_screen_only_long_stages_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(Stages())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "WORTH_TELLING", 0.0)
    run_stages(Stages())
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["Open: 0 s", "Search: 0 s, 3 rounds", "Verify: 0 s"]


def test_a_screen_shows_bars_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    stages = Stages()
    with stages:
        stages("Search [0, 1]", 1, 2)
        stages("Search [0, 1]", 0, 2)
        assert stages._bars is not None
        stages._bars.refresh()
        assert "Search [0, 1] (2)" in screen.getvalue() and "0/2" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[2K\x1b[?25h")  # the line erased, the cursor shown


def test_a_stage_that_fails_leaves_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "WORTH_TELLING", 0.0)
    stages = Stages().__enter__()
    stages("Search", 0, 2)
    stages.__exit__(ValueError, ValueError(), None)
    assert capsys.readouterr() == ("", "")
