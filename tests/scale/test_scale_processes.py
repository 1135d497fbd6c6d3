"""Jobs that are killed and go on, and jobs of two processes: really killed, really two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import CLASSES, NAME, hesper, sentence, write_images, write_weights
from hesper.runs import MODEL, RunFolder, open_run
from refining import FEW

REFINING = str(Path(__file__).parents[1] / "refining.py")
HESPER = (sys.executable, REFINING)
# Small batches, so that there are many moments to be killed at.
SETTINGS = ("--macs", "0.6", "--blocks", "alternate-early", "--draws", "2", "--batch-size", "4", "--rank", "4", "--refine", "2")
SEED = ("--seed", "7")  # with which both improvements are kept, so that they reach the plans that are compared
LONG = 120.0


@pytest.fixture(scope="module", autouse=True)
def small_jobs_refine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hesper.heart.prune.TUNE_IMAGES", FEW)
        patch.setattr("hesper.heart.prune.LEAST_FIT_IMAGES", FEW)
        yield


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of which one is damaged."""
    folder = write_images(tmp_path_factory.mktemp("scale") / "calib", 12)
    (folder / "bee" / "03.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def words(weights: Path, calib: Path) -> Callable[[Path], list[str]]:
    def command(out: Path) -> list[str]:
        return ["prune", NAME, "--weights", str(weights), "--calib", str(calib), "--out", str(out), "--data", str(calib), *SETTINGS, *SEED]

    return command


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, words: Callable[[Path], list[str]]) -> RunFolder:
    """The run of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("reference") / "run"
    result = hesper(*words(out))
    assert result.exit_code == 0, result.stderr
    run = open_run(out)
    assert run.plan.pricing is not None and run.plan.pricing.refit and run.plan.pricing.refine == 2
    return run


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts, none of which outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.terminate()  # torchrun passes it on to its own
    for process in started:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def start(processes: list[subprocess.Popen[str]], command: list[str], **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    processes.append(process)
    return process


def start_two(processes: list[subprocess.Popen[str]], command: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Two processes that know each other, without anybody who watches over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [start(processes, command, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def wait_for(work: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Until something is kept under a name."""
    deadline = time.monotonic() + LONG
    while not list(work.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def columns(run: RunFolder, entry: int) -> dict[str, Any]:
    return dict(run.entries[entry].results["per_image"])


def same(run: RunFolder, reference: RunFolder, tolerance: float = 0.0, nats: float = 0.0) -> None:
    """Two runs cut the same and found the same on every image, ``tolerance`` apart, or ``nats`` of drift."""
    plan, expected = run.plan, reference.plan
    cuts = [(cut.block, cut.combine, cut.remove) for cut in expected.tokens]
    assert [(cut.block, cut.combine, cut.remove) for cut in plan.tokens] == cuts and plan.heads == expected.heads and cuts
    dials = [cut.threshold for cut in expected.tokens]
    assert [cut.threshold for cut in plan.tokens] == pytest.approx(dials, rel=tolerance, abs=0)
    assert len(run.entries) == len(reference.entries) == 2
    for entry in range(2):
        found, known = columns(run, entry), columns(reference, entry)
        assert found.keys() == known.keys() and found["files"] == known["files"]
        for name in ("drift_kl", "macs", "agreement"):
            assert found[name] == pytest.approx(known[name], rel=tolerance, abs=nats if name == "drift_kl" else 0), name
        assert run.entries[entry].results["skipped"] == reference.entries[entry].results["skipped"]
    for key in ("images", "tokens", "heads", "heads_stderr"):
        ours, theirs = (np.array(each.entries[0].results["atlas"][key]) for each in (run, reference))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert tolerance or (run.path / MODEL).read_bytes() == (reference.path / MODEL).read_bytes()


def test_a_killed_job_goes_on_to_the_same_result(
    tmp_path: Path, words: Callable[[Path], list[str]], reference: RunFolder, processes: list[subprocess.Popen[str]]
) -> None:
    out, work = tmp_path / "run", tmp_path / ".run.work"
    for pattern in ("fit.*.safetensors", "tune-*.safetensors", "refit-*.safetensors", "refined-*.safetensors"):
        process = start(processes, [*HESPER, *words(out)])
        wait_for(work, pattern, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LONG)
        assert not out.exists() and list(work.glob(pattern))
    result = hesper(*words(out))
    assert result.exit_code == 0, result.stderr
    assert "Goes on with the work of an earlier process, kept in .run.work." in result.stderr
    same(open_run(out), reference)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_job_keeps_its_work_and_another_request_does_not_use_it(
    tmp_path: Path, words: Callable[[Path], list[str]], processes: list[subprocess.Popen[str]]
) -> None:
    out, work = tmp_path / "run", tmp_path / ".run.work"
    process = start(processes, [*HESPER, *words(out)])
    wait_for(work, "fit.*.safetensors", process)
    process.send_signal(signal.SIGSTOP)  # it must not finish meanwhile
    said = sentence(hesper(*words(out)), 2)
    assert "another process is making" in said
    both = start_two(processes, [*HESPER, *words(out)])
    heard = "".join(each.communicate(timeout=LONG)[1] for each in both)
    assert [each.returncode for each in both] == [2, 2] and heard.count("another process is making") == 1 and "died" not in heard
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=LONG)
    assert process.returncode == 1 and stdout == ""
    assert stderr.splitlines()[-1].startswith("hesper: interrupted; run the same command again, and it goes on with what .run.work keeps")
    assert [path.name for path in tmp_path.iterdir()] == [".run.work"]
    result = hesper(*words(out), "--seed", 1)
    assert result.exit_code == 0, result.stderr
    assert "What .run.work keeps is of another request (seed) and is not used." in result.stderr
    assert open_run(out).plan.provenance.seed == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_processes_survive_a_death_and_find_what_one_finds(
    tmp_path: Path, words: Callable[[Path], list[str]], reference: RunFolder, processes: list[subprocess.Popen[str]]
) -> None:
    out, work = tmp_path / "run", tmp_path / ".run.work"
    for moment in ("tune-*.1of2.safetensors", "refit-*.1of2.safetensors"):
        first, second = start_two(processes, [*HESPER, *words(out)])
        wait_for(work, moment, second)
        second.send_signal(signal.SIGKILL)
        stdout, stderr = first.communicate(timeout=60)
        assert first.returncode == 1 and stdout == "" and "Traceback" not in stderr
        assert "hesper: one of the 2 processes died or fell silent; run the same command again" in stderr.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == [".run.work"]
        assert not list(work.glob("dense-verify*")), "the other process went on alone"

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start(processes, [*torchrun, REFINING, *words(out), "--json"])
    stdout, stderr = process.communicate(timeout=LONG)
    assert process.returncode == 0, stderr
    assert stderr.count("Goes on with the work") == 1 and stderr.count("Skipped 2 files") == 1
    assert json.loads(stdout)["run"] == str(out)
    # Slopes are summed in another order, and Adam's steps do not shrink with what it sees: what is learned differs in its last digits.
    same(open_run(out), reference, tolerance=1e-5, nats=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_processes_evaluate_as_one(calib: Path, reference: RunFolder, processes: list[subprocess.Popen[str]]) -> None:
    command = [*HESPER, "eval", str(reference.path), "--data", str(calib), "--batch-size", "4", "--json"]
    alone = json.loads(hesper(*command[len(HESPER) :]).stdout)
    first, second = start_two(processes, command)
    stdout, stderr = first.communicate(timeout=LONG)
    assert (first.returncode, second.wait(LONG)) == (0, 0), stderr
    assert second.communicate() == ("", "")
    together = json.loads(stdout)
    assert together.keys() == alone.keys() and together["n"] == alone["n"] == 35
    assert {**together, "seconds": 0} == {**alone, "seconds": 0}
    assert len(open_run(reference.path).entries) == len(reference.entries) + 2


def test_processes_add_agree_speak_once_and_count_a_silent_one_as_dead(processes: list[subprocess.Popen[str]]) -> None:
    code = (
        "import time, torch; from hesper.parallel import leads, team\n"
        "crew = team(); total = torch.tensor([1.0 + crew.rank, 5.0], dtype=torch.float64); crew.sum([total])\n"
        "print(total.tolist(), crew.every(crew.rank), crew.first(crew.rank), leads() == (crew.rank == 0))\n"
        "print(crew.says('this'), flush=True)\n"
        "time.sleep(60 * crew.rank); crew.every(1)"
    )
    first, second = start_two(processes, [sys.executable, "-c", code], HESPER_TIMEOUT="6")
    stdout, stderr = first.communicate(timeout=LONG / 3)
    assert first.returncode == 1 and "one of the 2 processes died or fell silent" in stderr
    second.kill()
    found = [stdout.splitlines(), second.communicate()[0].splitlines()]
    assert [lines[0] for lines in found] == ["[3.0, 10.0] [0, 1] 0 True"] * 2
    assert sorted(lines[1] for lines in found) == ["False", "True"]


def test_what_fails_in_one_process_is_said_once_and_ends_them_all(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    def enlarge(state: dict[str, torch.Tensor]) -> None:
        # So large that patches of noise overflow, and grey ones, which are nearly zero, do not.
        state["patch_embed.proj.weight"] *= 1e21
        for name in ("patch_embed.proj.bias", "cls_token", "pos_embed"):
            state[name] *= 0

    weights, calib = write_weights(tmp_path / "large.safetensors", enlarge), tmp_path / "calib"
    for number in range(40):
        image = Image.new("RGB", (24, 24), (128, 128, 128)) if number != 4 else Image.effect_noise((24, 24), 90).convert("RGB")
        image.putpixel((number % 24, number // 24), (129, 129, 129))  # no two alike: what is fitted does not verify
        folder = calib / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:02}.png")
    for words in (["eval", NAME, "--data", calib], ["prune", NAME, "--calib", calib, *SETTINGS, "--out", tmp_path / "run"]):
        both = start_two(processes, [*HESPER, *map(str, words), "--weights", str(weights), "--batch-size", "4"])
        heard = [line for each in both for line in each.communicate(timeout=LONG)[1].splitlines() if line.startswith("hesper: ")]
        assert [each.returncode for each in both] == [1, 1] and len(heard) == 1 and "not finite" in heard[0], heard
    assert not [path.name for path in tmp_path.iterdir() if "run" in path.name]


def test_finished_processes_end_in_order_also_where_the_caller_has_disconnected_them(processes: list[subprocess.Popen[str]]) -> None:
    code = (
        "import atexit, sys; from torch import distributed; from hesper.parallel import team\n"
        "atexit.register(lambda: print(distributed.is_initialized()))  # runs after what is registered later\n"
        "crew = team(); crew.every(crew.rank)\n"
        "if sys.argv[1] == 'disconnect': distributed.destroy_process_group()"
    )
    for word in ("disconnect", "leave"):
        for process in start_two(processes, [sys.executable, "-c", code, word]):
            assert process.communicate(timeout=LONG) == ("False\n", "") and process.returncode == 0
