from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hesper.measure.fingerprint import Fingerprint, warnings_between
from hesper.measure.graphics import graphics, parse_graphics

HOT = "NVIDIA A100-SXM4-80GB, 535.54.03, 400.00, 1410, 1095, 84, 0x0000000000000020"
IDLE = "Orin (nvgpu), 540.4.0, [N/A], [N/A], [N/A], [N/A], [N/A]"


def test_cards_stand_together_and_the_slowest_and_hottest_counts() -> None:
    found = parse_graphics(f"{HOT}\n{HOT.replace('1095, 84, 0x0000000000000020', '1410, 60, 0x0000000000000004')}\n")
    assert found is not None and (found.megahertz, found.celsius, found.reasons) == (1095, 84, 0x24)
    assert found.fixed.count("driver 535.54.03, at most 400.00 W and 1410 MHz") == 2


def test_what_a_card_does_not_tell_is_unknown() -> None:
    found = parse_graphics(IDLE)
    assert found is not None and (found.megahertz, found.celsius, found.reasons) == (None, None, None)
    assert parse_graphics("No devices were found") is None and parse_graphics("") is None


@pytest.mark.parametrize(
    ("script", "known"),
    [
        (f"print({HOT!r})", True),
        ("raise SystemExit(9)", False),
        (f"print({HOT!r}); raise SystemExit(9)", False),
        ("import sys; sys.stdout.buffer.write(bytes([255, 254]))", False),
    ],
)
def test_the_tool_is_asked(script: str, known: bool) -> None:
    assert (graphics((sys.executable, "-c", script)) is not None) == known


def test_without_the_tool_nothing_is_known(tmp_path: Path) -> None:
    assert graphics((str(tmp_path / "nvidia-smi"),)) is None


def test_a_clock_that_was_held_back_is_warned_of() -> None:
    found = parse_graphics(HOT)
    assert found is not None
    after = Fingerprint({}, {"graphics_held_back": found.reasons})
    assert warnings_between(Fingerprint({}, {}), after) == ("the graphics card's clock was held back by its temperature, by the driver",)
    assert warnings_between(Fingerprint({}, {}), Fingerprint({}, {"graphics_held_back": 0})) == ()
