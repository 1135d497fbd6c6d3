"""Folders that look like the system files of boards, with figures that add up to what is said beside them."""

from __future__ import annotations

from pathlib import Path

I2C = "sys/bus/i2c/drivers"

BOARDS: dict[str, tuple[float, dict[str, dict[str, tuple[int, int]]]]] = {
    # board: watts of the module; chip folder: rails as (millivolts, milliamperes)
    "Orin Nano": (4.655, {"ina3221/1-0040/hwmon/hwmon1": {"VDD_IN": (5000, 931), "VDD_CPU_GPU_CV": (5000, 112), "VDD_SOC": (5000, 297)}}),
    "Orin NX": (4.305, {"ina3221/1-0040/hwmon/hwmon2": {"VDD_IN": (4920, 875), "VDD_CPU_GPU_CV": (4920, 116), "VDD_SOC": (4920, 247)}}),
    "AGX Orin": (
        12.616674,
        {
            "ina3221/1-0040/hwmon/hwmon3": {"VDD_GPU_SOC": (843, 6170), "VDD_CPU_CV": (780, 3437), "VIN_SYS_5V0": (4968, 953)},
            "ina3221/1-0041/hwmon/hwmon4": {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (4968, 80)},
        },
    ),
    "AGX Xavier": (
        5.23,
        {
            "ina3221x/1-0040/iio:device0": {"GPU": (5000, 100), "CPU": (5000, 200), "SOC": (5000, 300)},
            "ina3221x/1-0041/iio:device1": {"CV": (5000, 20), "VDDRQ": (5000, 126), "SYS5V": (5000, 300)},
        },
    ),
    "Xavier NX": (3.75, {"ina3221x/1-0040/hwmon/hwmon4": {"VDD_IN": (5000, 750), "VDD_CPU_GPU_CV": (5000, 90), "VDD_SOC": (5000, 210)}}),
    "TX2": (
        7.6,
        {
            "ina3221x/0-0040/iio:device0": {"VDD_SYS_GPU": (19000, 20), "VDD_SYS_SOC": (19000, 60), "VDD_4V0_WIFI": (4000, 5)},
            "ina3221x/0-0041/iio:device1": {"VDD_IN": (19000, 400), "VDD_SYS_CPU": (19000, 50), "VDD_SYS_DDR": (19000, 55)},
        },
    ),
    "Nano": (2.04, {"ina3221x/6-0040/iio:device0": {"POM_5V_IN": (5100, 400), "POM_5V_GPU": (5100, 10), "POM_5V_CPU": (5100, 80)}}),
    "Thor": (
        15.004,
        {"ina3221/2-0040/hwmon/hwmon5": {"VDD_GPU": (5000, -78), "VDD_CPU_SOC_MSS": (5000, 785), "VIN_SYS_5V0": (5000, 1013)}},
    ),
}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def jetson(root: Path, board: str) -> Path:
    """The sensors of a board, under ``root``; on Thor the carrier's INA238 too, its folder one level deeper than others."""
    _, chips = BOARDS[board]
    for folder, rails in chips.items():
        chip = root / I2C / folder
        write(chip / "name", folder.partition("/")[0])
        for place, (label, (millivolts, milliamperes)) in enumerate(rails.items()):
            if "iio" in folder:
                write(chip / f"rail_name_{place}", label)
                write(chip / f"in_voltage{place}_input", millivolts)
                write(chip / f"in_current{place}_input", milliamperes)
            else:
                write(chip / f"in{place + 1}_label", label)
                write(chip / f"in{place + 1}_input", millivolts)
                write(chip / f"curr{place + 1}_input", milliamperes)
        if "iio" not in folder:
            write(chip / "in7_label", "sum of shunt voltages")
            write(chip / "curr4_input", 99999)
    if board == "Thor":
        carrier = root / I2C / "ina238" / "2-0044" / "hwmon" / "hwmon6" / "hwmon7"
        write(carrier / "name", "ina238")
        write(carrier / "power1_input", 15_004_000)
    return root


def rapl(root: Path, counters: dict[str, tuple[str, int]], wraps: int = 262_143_328_850) -> Path:
    """Zones of a processor by folder name, such as ``intel-rapl:0:0``: their names and microjoules."""
    for folder, (name, microjoules) in counters.items():
        zone = root / "sys/class/powercap" / folder
        write(zone / "name", name)
        write(zone / "energy_uj", microjoules)
        write(zone / "max_energy_range_uj", wraps)
    return root
