from __future__ import annotations

from pathlib import Path

import pytest

from boards import write
from hesper.measure.fingerprint import Fingerprint, differences, fingerprint, warnings_between

CPU = "sys/devices/system/cpu"


def machine(root: Path, governor: str = "performance", throttled: int = 3, currents: int = 1) -> Path:
    for core in range(4):
        write(root / CPU / f"cpu{core}/cpufreq/scaling_governor", governor if core else "performance")
        write(root / CPU / f"cpu{core}/cpufreq/scaling_max_freq", 1_728_000)
        write(root / CPU / f"cpu{core}/thermal_throttle/core_throttle_count", throttled if core == 2 else 0)
    write(root / CPU / "cpufreq/ignored", 1)
    for zone, degrees in enumerate((48_093, -256_000, 51_500)):
        write(root / f"sys/class/thermal/thermal_zone{zone}/temp", degrees)
    write(root / "sys/class/hwmon/hwmon2/oc1_event_cnt", currents)
    write(root / "sys/class/hwmon/hwmon2/oc2_event_cnt", 0)
    write(root / "etc/nvpmodel.conf", "< POWER_MODEL ID=1 NAME=25W >")
    write(root / "var/lib/nvpmodel/status", "pmode:0001 fmode:cool")
    return root


def test_a_machine_says_what_times_depend_on(tmp_path: Path) -> None:
    found = fingerprint(machine(tmp_path, governor="schedutil"))
    assert found.fixed["governors"] == "performance, schedutil" and found.fixed["highest_khz"] == "1728000"
    assert found.fixed["power_mode"] == "25W" and found.fixed["turbo_off"] is None and found.fixed["torch"]
    assert (found.state["celsius"], found.state["throttled"], found.state["over_current"]) == (51.5, 3, 1)


def test_how_busy_a_machine_is_comes_from_what_passes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "proc/stat"
    write(stat, "cpu  1000 0 500 8000 100 0 10 0 0 0\ncpu0 1 1 1 1")
    monkeypatch.setattr("time.sleep", lambda _: write(stat, "cpu  1030 0 510 8150 110 0 10 0 0 0\ncpu0 1 1 1 1"))
    assert fingerprint(tmp_path).state["busy"] == pytest.approx(40 / 200)


def test_a_machine_that_shows_nothing_is_unknown_not_zero(tmp_path: Path) -> None:
    found = fingerprint(tmp_path)
    assert found.fixed["governors"] is None and found.fixed["power_mode"] is None
    assert (
        found.state["busy"] is None
        and found.state["celsius"] is None
        and found.state["throttled"] is None
        and found.state["over_current"] is None
    )


def test_what_keeps_two_measurements_from_being_compared_is_named(tmp_path: Path) -> None:
    same = fingerprint(machine(tmp_path / "a")), fingerprint(machine(tmp_path / "b"))
    assert differences(*same) == ()
    other = fingerprint(machine(tmp_path / "c", governor="powersave"))
    assert differences(same[0], other) == ("governors: performance and performance, powersave",)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"busy": 0.05, "throttled": 3}, {"throttled": 3}, ()),
        ({"busy": 0.5}, {"busy": 0.9}, ("other jobs took 50 % of the processor at the start",)),
        ({"over_current": 1}, {"over_current": 4}, ("an over-current limit was hit 3 times",)),
        ({"throttled": None}, {"throttled": 4}, ()),
        ({}, {"pi_throttled": 0x50000}, ()),
        ({}, {"pi_throttled": 0x50004}, ("the board limits itself (vcgencmd get_throttled: 0x50004)",)),
    ],
)
def test_what_happened_in_between_is_told(before: dict[str, int], after: dict[str, int], said: tuple[str, ...]) -> None:
    assert warnings_between(Fingerprint({}, before), Fingerprint({}, after)) == said


def test_a_setting_that_changed_in_between_is_told() -> None:
    before, after = Fingerprint({"governors": "performance"}, {}), Fingerprint({"governors": "powersave"}, {})
    assert warnings_between(before, after) == ("governors: performance and powersave",)
