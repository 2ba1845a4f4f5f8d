"""The laws of the house (docs/CONTRIBUTING.md), and linter and type checker are content."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minisft"
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
         for file in sorted(PACKAGE.rglob("*.py"))}
# From the ground up: a room may import those before it, and its own files.
ROOMS = ("errors", "files", "versions", "counter_rng", "streams", "config", "data", "model", "training",  # the core
         "cpu", "fp8", "context", "lean", "lora", "pretrained", "formats", "config_io", "prepare", "generate", "evals",
         "export", "planning", "reports", "runs", "demo", "cli", "__main__")
CORE = ROOMS[: ROOMS.index("cpu")]
SEAM = ("minisft.model.llama", "minisft.cpu.kernels")  # picks kernels by device; the one import from the core outwards


@cache
def imported(name):
    """Modules of the package that module `name` imports, anywhere in it and for types too, with their packages."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute here"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for each in found & FILES.keys() for module in with_packages(each)} - {name}


def with_packages(name):
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts) + 1)} & FILES.keys()


def room(name):
    return ([*name.split("."), "errors"])[1]  # minisft/__init__.py lies at the bottom


def closure(*names):
    found, todo = set(), [module for name in names for module in with_packages(name)]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            outwards = {"minisft.cpu", SEAM[1]} if name == SEAM[0] else set()
            todo += imported(name) - outwards if name != "minisft" else set()
    return found


def lines(names):
    return sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in names)


def test_the_loop_reaches_a_core_that_is_read_in_an_afternoon():
    reached = closure("minisft.training.loop")
    assert {room(name) for name in reached} <= set(CORE)
    assert len(reached) <= 16, sorted(reached)
    assert lines(reached) <= 3_000


@pytest.mark.parametrize("name", FILES)
def test_no_arrow_runs_up(name):
    above = {module for module in imported(name) if ROOMS.index(room(module)) > ROOMS.index(room(name))}
    if name != "minisft":  # its public names are imported when they are first used
        assert not above - ({"minisft.cpu", SEAM[1]} if name == SEAM[0] else set())


@pytest.mark.parametrize("name", FILES)
def test_no_circle(name):
    assert name == "minisft" or name not in {
        module for each in imported(name) - {"minisft"} if (name, each) != SEAM for module in closure(each)}


def test_no_two_public_names_are_the_same():
    modules = Counter(name.rsplit(".", 1)[-1] for name in FILES)
    classes = Counter(node.name.lower() for file in FILES.values() for node in ast.walk(ast.parse(file.read_text()))
                      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    assert [name for names in (modules, classes) for name, count in names.items() if count > 1] == []


def test_the_package_is_short():
    assert lines(FILES) <= 14_738


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    """At most 60 lines, docstring, blanks and comments included; the loop may be longer."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}: {node.name} has over 60 lines"


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_has_a_docstring(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in (tree, *tree.body):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            own = getattr(node, "name", "the module")
            assert own.startswith("_") or ast.get_docstring(node), f"{name}: {own} has no docstring"


def test_the_runtime_needs_five_packages():
    code = "import sys, minisft, minisft.runs.lifecycle, minisft.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"transformers", "trl", "datasets", "accelerate", "pandas", "requests"} & set(loaded.split())


def test_help_does_not_wait_for_torch():
    code = "import sys, minisft, minisft.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "numpy", "tokenizers", "matplotlib"} & set(loaded.split())


def test_lint():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_types():
    """Strict, as pyproject.toml says; most of the time without a cache goes into torch's own annotations."""
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
