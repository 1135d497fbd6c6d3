"""The rules of the house that a machine can check: import directions, tests that assert, short files, nothing of one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hesper"
# Each room may import from rooms of its own rank or lower, never from higher ones.
RANKS = [
    {"errors", "version"},
    {"registry", "device", "precision", "parallel", "kinds"},
    {"plan", "meters"},
    {"cost", "data", "runs", "curvature"},
    {"hosts", "work"},
    {"graft"},
    {"measure"},
    {"heart"},
    {"artefact"},
    {"exporting"},
    {"benchmark"},
    {"api"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def room_of(path):
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hesper."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.ImportFrom) and node.module == "hesper":
            yield from (alias.name if alias.name in RANK else "the package's face" for alias in node.names)
        if isinstance(node, ast.Import):
            names = [f"{alias.name}.".split(".") for alias in node.names]
            yield from (name[1] or "the package's face" for name in names if name[0] == "hesper")


ROOMS = [f for f in FILES if f != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", ROOMS, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    own = room_of(path)
    assert own in RANK, f"{own} has no rank yet; give it one"
    for other in imports(path):
        assert other in RANK, f"{own} imports {other}, which stands above every room"
        assert other == own or RANK[other] <= RANK[own], f"{own} imports {other}"
        assert other == own or RANK[other] < RANK[own] or {own, other} <= {"runs", "data", "cost", "curvature"}


def test_public_names_are_the_same_before_and_after_their_rooms_are_loaded():
    script = """
import importlib, pkgutil, types, hesper
before = {name: getattr(hesper, name) for name in hesper.__all__}
for room in pkgutil.iter_modules(hesper.__path__):
    if room.name != "__main__":
        importlib.import_module(f"hesper.{room.name}")
for name, value in before.items():
    assert getattr(hesper, name) is value and not isinstance(value, types.ModuleType), name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT / "src")
    assert done.returncode == 0, done.stderr


def test_only_hosts_know_a_model_library():
    # The demo writes a model of its own, the doctor reports versions; nobody else names timm's modules.
    named = {room_of(f) for f in FILES if re.search(r"^\s*(import|from) timm", f.read_text(), re.M)}
    assert named <= {"hosts", "demo", "cli"}


def test_the_words_are_free_of_torch():
    for room in ("plan", "runs"):
        for path in (SOURCE / room).rglob("*.py"):
            assert not re.search(r"^(import|from) torch", path.read_text(), re.M), path


@pytest.mark.parametrize("path", TESTS, ids=lambda f: f.name)
def test_every_test_asserts_something(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            helped = any(re.search(r"(^|[._])(assert_\w+|raises|warns|refused?|check\w*)$", call) for call in calls)
            assert helped or any(isinstance(n, ast.Assert) for n in ast.walk(node)), f"{path.name}:{node.name} asserts nothing"


def test_files_and_functions_stay_short():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 420, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert length <= 60, f"{path.name}:{node.name} has {length} lines"


WRITTEN = [f for folder in ("src", "tests", "docs", "benchmarks", ".ci") for f in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())


def test_nothing_speaks_of_one_machine():
    """No absolute path of a home or working folder in anything that is written by hand."""
    texts = [
        f
        for f in WRITTEN
        if f.is_file() and f.suffix in {".py", ".md", ".toml", ".cff", ".j2", ".css", ".jsonl", ""} and f != Path(__file__)
    ]
    assert len(texts) > 100
    for path in texts:
        found = re.search(r"(?<![\w./])/(home|root|Users|work|mnt|tmp)/\w", path.read_text(errors="replace"))
        assert found is None, f"{path}: {found}"
