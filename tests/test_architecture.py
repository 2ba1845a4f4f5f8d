"""The house keeps its shape: imports go downward, and linter and type checker are content."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minisft"

# What each room must not know. `errors` is below all; config's readers are at the top.
FORBIDDEN = {
    "data": ("model", "training", "evaluation", "planning", "reports", "config", "prepare", "demo", "commands"),
    "model": ("data", "training", "evaluation", "planning", "reports", "config", "prepare", "demo", "commands", "lora",
              "pretrained"),
    "lora": ("data", "training", "evaluation", "planning", "reports", "prepare", "demo", "commands", "cpu"),
    "cpu": ("data", "training", "evaluation", "planning", "reports", "config", "prepare", "demo", "commands", "lora"),
    "training": ("demo", "commands", "__main__"),
    "evaluation": ("config", "prepare", "planning", "demo", "commands", "__main__"),
    "planning": ("evaluation", "reports", "demo", "commands"),
    "reports": ("training", "evaluation", "planning", "config", "demo", "commands"),
    "prepare.py": ("training", "evaluation", "planning", "reports", "demo"),
    "errors.py": ("data", "model", "training", "evaluation", "config", "prepare", "demo"),
    "config.py": ("data", "model", "training", "evaluation", "prepare", "demo"),
}
# Of logs: they know no data set.
PLAIN_FILES = ("page.py", "drawing.py", "runs.py", "shapes.py", "run_report.py", "run_data.py",
               "tensorboard.py")
READS_CONFIG = {"runs/lifecycle.py", "runs/assemble.py", "prepare.py", "demo/demo_run.py", "planning/estimate.py",
                "commands/prepare_command.py", "commands/show_command.py", "commands/plan_command.py"}


def imported(file):
    """Rooms of minisft that `file` imports anywhere in it: minisft.model.llama -> model."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "minisft":
            modules = [f"minisft.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: imports are absolute here"
        yield from (module.split(".")[1] for module in modules if module.startswith("minisft."))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_downward(file):
    place = file.relative_to(PACKAGE)
    rooms = set(imported(file))
    assert not rooms & set(FORBIDDEN.get(place.parts[0], ())), f"{place} imports {rooms}"
    if place.name in PLAIN_FILES and place.parts[0] == "reports":
        assert rooms <= {"reports", "errors", "counter_rng"}, f"{place} imports {rooms}"
    assert "cpu" not in rooms or str(place) in ("model/llama.py", "commands/chat_command.py"), place


@pytest.mark.parametrize("file", [*sorted(PACKAGE.rglob("*.py")), ROOT / "train.py"], ids=lambda f: f.name)
def test_files_and_functions_are_short(file):
    """At most 350 lines a file and 60 a function, from `def` to its last line: docstring, blanks and comments count."""
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{file.name}: {node.name} has over 60 lines; what wants a name?"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_what_is_public_says_what_it_is(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in (tree, *tree.body):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            name = getattr(node, "name", "the module")
            assert name.startswith("_") or ast.get_docstring(node), f"{file.name}: {name} has no docstring"


def test_the_network_is_one_file_and_its_shape():
    code = "import sys, minisft.model.llama; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {name for name in loaded.split() if name.startswith("minisft")} == {
        "minisft", "minisft.errors", "minisft.files", "minisft.model", "minisft.model.llama",
        "minisft.model.llama_config"}


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
