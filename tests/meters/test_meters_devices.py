"""Meters of devices, against folders and programs that look like theirs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from boards import BOARDS, I2C, jetson, rapl, write
from hesper.errors import UsageError
from hesper.meters import MeterLost, make, stream, survey, usable
from hesper.meters.apple import Apple
from hesper.meters.jetson import Jetson, rails
from hesper.meters.nvml import Nvml
from hesper.meters.power_mode import PowerMode, parse_query, power_mode
from hesper.meters.rapl import Rapl
from hesper.meters.raspberry import Raspberry
from hesper.meters.raspberry import parse as parse_pi
from hesper.meters.stream import Lines
from hesper.meters.tegrastats import Tegrastats
from hesper.meters.tegrastats import parse as parse_tegrastats


def program(folder: Path, name: str, script: str) -> str:
    """A program that runs a few lines of Python."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("board", BOARDS)
def test_a_boards_total_is_right_to_the_milliwatt(tmp_path: Path, board: str) -> None:
    meter = Jetson(jetson(tmp_path, board))
    assert meter.probe().usable
    reading = meter.read()
    watts, chips = BOARDS[board]
    assert reading.total == pytest.approx(watts, abs=0.0005)
    measured = {label: mv * ma * 1e-6 for chip in chips.values() for label, (mv, ma) in chip.items() if label != "NC"}
    measured |= {"VIN": 15.004} if board == "Thor" else {}
    assert reading.rails == pytest.approx(measured) and meter.scope == ("board" if board == "Thor" else "module")


def test_a_sensor_that_is_shown_in_several_places_counts_once(tmp_path: Path) -> None:
    jetson(tmp_path, "AGX Orin")
    for number, folder in ((3, "1-0040"), (4, "1-0041")):
        link = tmp_path / "sys/class/hwmon" / f"hwmon{number}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / I2C / "ina3221" / folder / "hwmon" / f"hwmon{number}")
    assert [rail.label for rail in rails(tmp_path)] == ["VDDQ_VDD2_1V8AO", "VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"]
    assert Jetson(tmp_path).read().total == pytest.approx(12.616674)


def test_units_behind_a_number_and_channels_that_are_off(tmp_path: Path) -> None:
    chip = jetson(tmp_path, "Orin Nano") / I2C / "ina3221/1-0040/hwmon/hwmon1"
    write(chip / "curr1_input", "931 ma")
    write(chip / "in3_enable", 0)
    reading = Jetson(tmp_path).read()
    assert reading.total == pytest.approx(4.655) and set(reading.rails) == {"VDD_IN", "VDD_CPU_GPU_CV"}


def test_other_sensors_are_left_alone(tmp_path: Path) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon0"
    for name, content in (("name", "nct6775"), ("in1_label", "VDD_IN"), ("in1_input", 1), ("curr1_input", 1)):
        write(chip / name, content)
    said = Jetson(tmp_path).probe()
    assert not said.usable and "no INA3221" in said.reason


def test_an_inner_rail_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    chip = jetson(tmp_path, "Orin Nano") / I2C / "ina3221/1-0040/hwmon/hwmon1"
    (chip / "curr2_input").write_text("")
    reading = Jetson(tmp_path).read()
    assert reading.total == pytest.approx(4.655) and set(reading.rails) == {"VDD_IN", "VDD_SOC"}


def test_only_thors_lone_ina238_is_its_input(tmp_path: Path) -> None:
    other = tmp_path / "orin" / I2C / "ina238/3-0045/hwmon/hwmon9"
    write(other / "name", "ina238")
    write(other / "power1_input", 1_000_000)
    reading = Jetson(jetson(tmp_path / "orin", "Orin Nano")).read()
    assert reading.total == pytest.approx(4.655) and reading.rails["INA238 hwmon9"] == 1.0
    second = jetson(tmp_path / "thor", "Thor") / I2C / "ina238/1-0045/hwmon/hwmon9"
    write(second / "name", "ina238")
    write(second / "power1_input", 1_000_000)
    assert not Jetson(tmp_path / "thor").probe().usable
    switch = Jetson(tmp_path / "switch")
    assert not switch.probe().usable


def test_two_sensors_of_one_name_are_not_chosen_between(tmp_path: Path) -> None:
    chip = jetson(tmp_path, "Orin Nano") / I2C / "ina3221/1-0041/hwmon/hwmon8"
    for name, content in (("name", "ina3221"), ("in1_label", "VDD_IN"), ("in1_input", 1), ("curr1_input", 1)):
        write(chip / name, content)
    assert "several sensors are called VDD_IN" in Jetson(tmp_path).probe().reason


def test_an_unknown_boards_rails_make_no_total(tmp_path: Path) -> None:
    chip = tmp_path / I2C / "ina3221/1-0040/hwmon/hwmon0"
    for name, content in (("name", "ina3221"), ("in1_label", "VDD_CORE"), ("in1_input", 900), ("curr1_input", 1000)):
        write(chip / name, content)
    meter = Jetson(tmp_path)
    said = meter.probe()
    assert not said.usable and "VDD_CORE" in said.reason and "not known" in said.reason
    with pytest.raises(MeterLost, match="VDD_CORE"):
        meter.read()


def test_a_sensor_that_goes_away(tmp_path: Path) -> None:
    meter = Jetson(jetson(tmp_path, "Nano"))
    meter.read()
    (tmp_path / I2C / "ina3221x/6-0040/iio:device0/in_current0_input").unlink()
    with pytest.raises(MeterLost, match="POM_5V_IN"):
        meter.read()


PACKAGES = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 600_000),
    "intel-rapl:0:1": ("dram", 200_000),
    "intel-rapl:1": ("package-1", 5_000_000),
    "intel-rapl:1:0": ("dram", 100_000),
    "intel-rapl:2": ("psys", 9_000_000),
    "intel-rapl-mmio:0": ("package-0", 1_000_000),
}


def test_counters_add_up_without_counting_twice(tmp_path: Path) -> None:
    meter = Rapl(rapl(tmp_path, PACKAGES))
    assert meter.probe().usable and meter.read().total == 0
    later = {folder: (name, before + 1_000_000 * (1 + place)) for place, (folder, (name, before)) in enumerate(PACKAGES.items())}
    rapl(tmp_path, later)
    reading = meter.read()
    assert reading.total == pytest.approx(1 + 3 + 4 + 5)  # two packages and the memory of each
    assert reading.rails == pytest.approx(
        {"package-0": 1, "package-0/core": 2, "package-0/dram": 3, "package-1": 4, "package-1/dram": 5, "psys": 6}
    )


def test_a_hidden_inner_counter_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(tmp_path, PACKAGES)
    monkeypatch.setattr("hesper.meters.rapl.os.access", lambda path, _: path.parent.name != "intel-rapl:0:0")
    meter = Rapl(tmp_path)
    assert meter.probe().usable and "package-0/core" not in meter.read().rails and "package-0/dram" in meter.read().rails


def test_counters_that_begin_again(tmp_path: Path) -> None:
    meter = Rapl(rapl(tmp_path, {"intel-rapl:0": ("package-0", 9_500_000)}, wraps=10_000_000))
    meter.read()
    for microjoules, joules in ((9_900_000, 0.4), (300_000, 0.8), (200_000, 10.7)):
        rapl(tmp_path, {"intel-rapl:0": ("package-0", microjoules)}, wraps=10_000_000)
        assert meter.read().total == pytest.approx(joules)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_that_may_not_be_read_name_the_command_that_helps(tmp_path: Path) -> None:
    rapl(tmp_path, PACKAGES)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
    said = Rapl(tmp_path).probe()
    assert not said.usable and "sudo chmod a+r" in said.reason


def test_refused_counters_name_the_command_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Rapl(rapl(tmp_path, PACKAGES))
    monkeypatch.setattr(Path, "read_text", _refuse)
    said = meter.probe()
    assert not said.usable and "root only" in said.reason and "sudo chmod a+r" in said.reason


def _refuse(*_: Any, **__: Any) -> str:
    raise PermissionError(13, "Permission denied")


def test_no_counters(tmp_path: Path) -> None:
    said = Rapl(tmp_path).probe()
    assert not said.usable and "no package counter" in said.reason


LINES = (Path(__file__).parent / "tegrastats.txt").read_text().splitlines()
SAMPLES = [(LINES[at].removeprefix("# "), LINES[at + 1]) for at in range(0, len(LINES), 2)]


@pytest.mark.parametrize(("said", "line"), SAMPLES, ids=[said.split(" (")[0].split(":")[0] for said, _ in SAMPLES])
@pytest.mark.parametrize("gap", [" ", "    "])
def test_lines_of_tegrastats(said: str, line: str, gap: str) -> None:
    expected = said.split(": ", 1)[1]
    found = parse_tegrastats(line.replace(" ", gap))
    assert " ".join(f"{label}={value}" for label, value in found.items()) == expected


def test_tegrastats_as_a_meter(tmp_path: Path) -> None:
    line = next(line for said, line in SAMPLES if "jetson_exporter" in said)
    script = f"assert sys.argv[1:] == ['--interval', '100']\nwhile True:\n    print({line!r}, flush=True)\n    time.sleep(.01)"
    meter = Tegrastats(program(tmp_path, "tegrastats", script))
    try:
        said = meter.probe()
        assert said.usable and "VDDQ_VDD2_1V8AO" in said.reason
        assert meter.read().total == pytest.approx(2.34 + 0.39 + 4.025)
    finally:
        meter.close()


def test_tegrastats_that_ends_names_no_rail_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Tegrastats(program(tmp_path, "ends", "print('RAM 1/2MB VDD_IN 10mW/10mW', flush=True); sys.exit(3)"))
    assert ends.read().total == pytest.approx(0.01)
    with pytest.raises(MeterLost, match=r"ended \(exit code 3\)"):
        ends.read()
    ends.close()
    slow = "print('RAM 1/2MB', flush=True); print('', flush=True); time.sleep(.1); print('VDD_IN 30mW/30mW', flush=True); time.sleep(9)"
    patient = Tegrastats(program(tmp_path, "patient", slow))
    assert patient.read().total == pytest.approx(0.03)
    patient.close()
    monkeypatch.setattr(stream, "PATIENCE", 0.3)
    nameless = Tegrastats(program(tmp_path, "nameless", "print('RAM 1/2MB', flush=True); time.sleep(9)"))
    assert "nothing of use" in nameless.probe().reason
    odd = Tegrastats(program(tmp_path, "odd", "print('VDD_CORE 1/2', flush=True); time.sleep(9)"))
    assert "VDD_CORE, whose total is not known" in odd.probe().reason
    assert "there is no program 'tegrastats-not-there'" in Tegrastats("tegrastats-not-there").probe().reason


def test_what_was_printed_before_is_not_read_as_now(tmp_path: Path) -> None:
    old, new = "print('VDD_IN 90000mW/1mW', flush=True)", "print('VDD_IN 5000mW/1mW', flush=True)"
    script = f"for _ in range(50):\n    {old}\ntime.sleep(.6)\nwhile True:\n    {new}\n    time.sleep(.02)"
    meter = Tegrastats(program(tmp_path, "bursts", script))
    try:
        assert meter.read().total == 90.0
        time.sleep(0.3)
        before = time.monotonic()
        reading = meter.read()
        assert reading.total == 5.0 and reading.seconds is not None and reading.seconds > before
    finally:
        meter.close()


def test_a_program_that_may_not_be_ended_ends_when_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines([program(tmp_path, "loud", "while True:\n    print('x', flush=True)\n    time.sleep(.02)")])
    next(lines.since(0.0))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lines._process, "send_signal", refuse)
    started = time.monotonic()
    lines.close()
    assert time.monotonic() - started < 3 and lines._process.poll() is not None


def test_a_silent_helper_that_keeps_the_pipe_open_does_not_hold_the_close(tmp_path: Path) -> None:
    lines = Lines(["sh", "-c", "echo x; sleep 5 & sleep 5"])
    next(lines.since(0.0))
    started = time.monotonic()
    lines.close()
    assert time.monotonic() - started < 3


PI = """     VDD_CORE_A current(7)=5.03652000A
     3V3_SYS_A current(1)=0.10000000A
     VDD_CORE_V volt(15)=0.89369880V
     3V3_SYS_V volt(9)=3.30000000V
EXT5V_V volt(24)=4.92450000V
BATT_V volt(25)=nanV
"""


def test_lines_of_vcgencmd() -> None:
    assert parse_pi(PI) == {
        "VDD_CORE_A": 5.03652,
        "3V3_SYS_A": 0.1,
        "VDD_CORE_V": 0.8936988,
        "3V3_SYS_V": 3.3,
        "EXT5V_V": 4.9245,
    }
    assert parse_pi("VDD_CORE_V=0.8750V\nVDD_CORE_A=2A") == {"VDD_CORE_V": 0.875, "VDD_CORE_A": 2.0}


def test_a_raspberry_pi(tmp_path: Path) -> None:
    meter = Raspberry(program(tmp_path, "vcgencmd", f"assert sys.argv[1:] == ['pmic_read_adc']\nprint({PI!r})"))
    assert meter.probe().usable
    assert meter.read().total == pytest.approx(5.03652 * 0.8936988 + 0.33)
    seen = tmp_path / "seen"
    script = f"import os\ntext = {PI!r}\nprint(text.replace('0.89369880', 'nan') if os.path.exists({str(seen)!r}) else text)"
    flickers = Raspberry(program(tmp_path, "flickers", script))
    flickers.read()
    seen.touch()
    with pytest.raises(MeterLost, match="no longer gives VDD_CORE"):
        flickers.read()
    older = Raspberry(program(tmp_path, "older", "print('Command not registered'); sys.exit(255)"))
    said = older.probe()
    assert not said.usable and "Command not registered" in said.reason


SAMPLE = "*** Sampled system activity\nCPU Power: 1200 mW\nGPU Power: 30 mW\nANE Power: 0 mW\nCombined Power (CPU + GPU + ANE): 1230 mW\n"


def test_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Apple([program(tmp_path, "powermetrics", f"while True:\n    print({SAMPLE!r}, flush=True)\n    time.sleep(.01)")])
    try:
        assert meter.probe().usable
        assert meter.read().total == 1.23 and meter.read().rails == {"CPU": 1.2, "GPU": 0.03, "ANE": 0.0}
    finally:
        meter.close()
    refused = Apple([program(tmp_path, "refused", "sys.exit(1)")])
    assert not refused.probe().usable
    monkeypatch.setattr(stream, "PATIENCE", 0.5)
    intel = "while True:\n    print('Intel energy model derived package power (CPUs+GT+SA): 1.23W', flush=True)\n    time.sleep(.01)"
    said = Apple([program(tmp_path, "intel", intel)]).probe()
    assert not said.usable and "Apple silicon" in said.reason


class Library:
    """What ``pynvml`` looks like on a card, whose queries may be refused."""

    class NVMLError(Exception):
        pass

    def __init__(self, counts: bool, powers: bool) -> None:
        self.counts, self.powers, self.open, self.microjoules = counts, powers, 0, 5_000

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index:
            raise self.NVMLError("Not Found")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return 0

    def nvmlDeviceGetName(self, _: int) -> str:
        return "a card"

    def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> int:
        if not self.counts:
            raise self.NVMLError("Not Supported")
        self.microjoules += 1_500
        return self.microjoules

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:
        if not self.powers:
            raise self.NVMLError("Not Supported")
        return 31_000


def test_cards_by_their_counter_or_their_power() -> None:
    library = Library(counts=True, powers=True)
    meter = Nvml(library=library)
    assert meter.probe().usable and meter.quantity == "joules"
    assert meter.read().total == pytest.approx(3.0)
    meter.close()
    powers = Nvml(library=Library(counts=False, powers=True))
    assert powers.probe().reason == "power of a card" and powers.quantity == "watts" and powers.read().total == 31.0
    assert library.open == 0


def test_a_card_is_usable_only_if_it_can_be_read() -> None:
    jetson_like = Library(counts=False, powers=False)
    said = Nvml(library=jetson_like).probe()
    assert not said.usable and "neither its energy nor its power" in said.reason and jetson_like.open == 0
    missing = Library(counts=True, powers=True)
    assert "no card 3" in Nvml(3, missing).probe().reason and missing.open == 0
    assert Nvml("GPU-1234", missing).probe().usable and "no card GPU-9" in Nvml("GPU-9", missing).probe().reason


def test_a_card_that_is_lost() -> None:
    library = Library(counts=True, powers=True)
    meter = Nvml(library=library)
    meter.read()
    library.counts = False
    with pytest.raises(MeterLost, match="Not Supported"):
        meter.read()


QUERY = """NVPM WARN: Golden image context is already created
NVPM WARN: fan mode is not set to cool
NV Fan Mode:quiet
NV Power Mode: 15W
0
"""
CONF = """< PM_CONFIG DEFAULT=1 >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
"""


def test_power_modes_go_by_name(tmp_path: Path) -> None:
    assert parse_query(QUERY) == PowerMode("15W", 0)
    assert parse_query("NV Power Mode: MODE_30W\nNVPM VERB: x 5\n2\n") == PowerMode("MODE_30W", 2)
    assert parse_query("NVPM ERROR: bad input!") is None
    asked = program(tmp_path, "nvpmodel", f"assert sys.argv[1:] == ['-q']\nprint({QUERY!r})")
    assert power_mode(tmp_path, asked) == PowerMode("15W", 0)
    write(tmp_path / "etc/nvpmodel.conf", CONF)
    write(tmp_path / "var/lib/nvpmodel/status", "pmode:0002 fmode:fan_mode_quiet")
    assert power_mode(tmp_path, asked) == PowerMode("MAXN_SUPER", 2)
    write(tmp_path / "var/lib/nvpmodel/status", "pmode:0009")
    assert power_mode(tmp_path, asked) == PowerMode("15W", 0)
    assert power_mode(tmp_path / "none", "nvpmodel-not-there") is None


def test_the_best_usable_meter_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # boards have programs that would be found
    with usable("auto", root=tmp_path) as (meter, reason):
        assert meter is None and "jetson:" in reason and "rapl:" in reason
    with usable("auto", root=rapl(tmp_path, PACKAGES)) as (meter, _):
        assert meter is not None and meter.name == "rapl"
    with usable("auto", root=jetson(tmp_path, "Orin NX")) as (meter, _):
        assert meter is not None and meter.name == "jetson"
    with usable("none", root=tmp_path) as (meter, reason):
        assert meter is None and "asked" in reason
    found = {said.meter: said.usable for said in survey(tmp_path)}
    assert found["jetson"] and found["rapl"] and not found["raspberry"]
    with pytest.raises(UsageError, match="did you mean 'rapl'"):
        make("rapls")
