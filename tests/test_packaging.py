"""The wheel is complete: it has the recipes, sample data, tables and pages."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from small_runs import options

ROOT = Path(__file__).parent.parent


def shipped():
    """Every file of the package that a checkout has, relative to the root."""
    files = (file for file in (ROOT / "minisft").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_runs(base, tmp_path):
    copy = tmp_path / "copy"  # building leaves files behind
    shutil.copytree(ROOT / "minisft", copy / "minisft")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert shipped() <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    code = "import minisft.__main__ as m, sys; print(m.__file__); sys.exit(m.main(sys.argv[1:]))"
    command = ["plan", "llama3-8b", "--tokens", "1M", "--model.init", "random", "--model.config", "llama-3-8b"]
    ran = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, env=elsewhere, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout
    assert "GiB" in ran.stdout
    train = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "127.0.0.1:0", "-m", "minisft", "train", *options(base, tmp_path, train__max_steps=1)]
    ran = subprocess.run(train, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run/final/config.json").exists()


def test_every_file_of_the_package_has_a_pattern(monkeypatch):
    said = {}
    monkeypatch.setattr("setuptools.setup", said.update)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), str(ROOT / "setup.py"), "exec"),
         {"__file__": str(ROOT / "setup.py")})
    matched = {str(file.relative_to(ROOT)) for pattern in said["package_data"]["minisft"]
               for file in (ROOT / "minisft").glob(pattern)}
    assert matched == {file for file in shipped() if not file.endswith(".py")}
    assert {Path(file).parent.as_posix().replace("/", ".") for file in shipped() if file.endswith(".py")} == \
        set(said["packages"])
