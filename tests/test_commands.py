"""The commands as a newcomer meets them: help, versions, recipes, training from anywhere, ids of the hub."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from small_runs import log, options

from minisft import config_io
from minisft.__main__ import main, parser
from minisft.files import from_hub

ROOT = Path(__file__).parent.parent
COMMANDS = [*parser()._subparsers._group_actions[0].choices]
MODULE = [sys.executable, "-m", "minisft"]
PROGRAMS = {"train.py": [sys.executable, str(ROOT / "train.py")], "minisft train": [*MODULE, "train"],
            "torchrun -m": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend",
                            "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "minisft", "train"]}


def run(command, folder, **environment):
    """`command` in a folder far from the repository, as with an installed package."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env={
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["recipes"], ["recipes", "demo"],
                                  *([command, "--help"] for command in COMMANDS)])
def test_no_help_waits_for_torch(argv):
    code = ("import atexit, os, resource, sys; from minisft.__main__ import main; end = os._exit\n"
            "def check(code=0):\n"
            "    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
            "    print('torch' in sys.modules, seconds < 1, file=sys.stderr)\n"
            "    sys.stdout.flush(); sys.stderr.flush(); end(code)\n"
            f"os._exit = check; atexit.register(check); sys.exit(main({argv}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "False True\n")
    assert done.stdout


def test_the_help_of_training_has_every_key(tmp_path):
    for program in ("train.py", "minisft train"):
        assert run([*PROGRAMS[program], "--help"], tmp_path).stdout == config_io.help_text() + "\n"
    assert "    train " in run([*MODULE, "--help"], tmp_path).stdout


@pytest.mark.parametrize(("arguments", "option"), [
    (["eval", "M", "--choices", "a", "--limit", "2", "--choices", "b"], "--choices"),
    (["compare", "--ratings", "a", "b", "--key", "k", "--key", "l"], "--key"),
    (["plan", "--gpus", "8", "--gpus", "2"], "--gpus")])
def test_an_option_is_given_once(capsys, arguments, option):
    """The first values would be dropped."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (f"minisft {arguments[0]}: error: argument {option}: given "
                                                        "twice; give it once, before all its values")


def test_the_versions(capsys):
    import torch

    import minisft

    assert main(["--version"]) == 0  # an index's wheel is known as 2.14.1 to pip and calls itself 2.14.1+cu130
    release = torch.__version__.split("+")[0]
    assert capsys.readouterr().out.startswith(f"minisft {minisft.__version__}, torch {release}")


def test_recipes_are_listed_with_what_they_are_for_and_printed(capsys):
    assert main(["recipes"]) == 0
    *lines, _, last = capsys.readouterr().out.splitlines()
    shipped = config_io.shipped_recipes()
    assert [line.split()[0] for line in lines] == list(shipped)
    assert all(line.endswith(".") and len(line) <= 130 for line in lines)  # a whole sentence
    assert "`minisft recipes NAME > my.toml`" in last
    for name, file in shipped.items():
        assert main(["recipes", name]) == 0
        text = capsys.readouterr().out
        assert text == file.read_text(encoding="utf-8")
        assert tomllib.loads(text)
    assert main(["recipes", "llama3-8b-lor"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: llama3-8b-lor: not a shipped recipe (did you mean llama3-8b-lora?); they are demo-base, demo, ")


@pytest.mark.parametrize("program", [
    pytest.param(program, marks=[pytest.mark.slow] * (program != "minisft train")) for program in PROGRAMS])
def test_training_is_one_command_under_three_names(base, tmp_path, program):
    """Each trains in any folder, ends with the exit code of the run, and has the allocator's setting before torch."""
    done = run([*PROGRAMS[program], *options(base, tmp_path, train__max_steps=1)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(log(tmp_path)) == 1
    assert (tmp_path / "run/final/config.json").exists()
    again = run([*PROGRAMS[program], *options(base, tmp_path, train__max_steps=1)], tmp_path)
    assert again.returncode == (1 if "torchrun" in program else 2)
    assert "run: holds a finished run; choose another folder" in again.stderr


@pytest.mark.parametrize(("environment", "expected"), [({}, "expandable_segments:True"),
                                                       ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native")])
def test_the_allocator_is_set_before_torch_is_loaded(tmp_path, environment, expected):
    spy = tmp_path / "sitecustomize.py"
    spy.write_text("import os, sys\nclass Spy:\n    def find_spec(self, name, path=None, target=None):\n"
                   "        if name == 'torch':\n"
                   "            print('torch with', os.environ.get('PYTORCH_ALLOC_CONF'), flush=True)\n"
                   "            os._exit(9)\nsys.meta_path.insert(0, Spy())\n")
    for program in ("train.py", "minisft train"):
        done = run([*PROGRAMS[program], "demo-base"], tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}", **environment)
        assert (done.returncode, done.stdout) == (9, f"torch with {expected}\n")


@pytest.mark.parametrize("shell", ["{} >&- 2>&- <&-",
                                   pytest.param("{} >/dev/full 2>/dev/full", marks=pytest.mark.slow)])
def test_minisft_train_outlives_whoever_reads_its_output(base, tmp_path, shell):
    line = shell.format(" ".join(f"'{word}'" for word in [*PROGRAMS["minisft train"],
                                                          *options(base, tmp_path, train__max_steps=1)]))
    assert run(["bash", "-c", line], tmp_path).returncode == 0
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_two_ranks_of_minisft_train(base, tmp_path):
    command = [word if word != "1" else "2" for word in PROGRAMS["torchrun -m"]]
    done = run([*command, *options(base, tmp_path, train__max_steps=2)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(log(tmp_path)) == 2


# ---- ids of the hub -----------------------------------------------------------------------------------------------

LLAMA = ("If meta-llama/Llama-3.2-1B is on the Hugging Face hub, download it, and pass {} models/Llama-3.2-1B:\n"
         "  hf download meta-llama/Llama-3.2-1B --local-dir models/Llama-3.2-1B --exclude \"original/*\"\n"
         "Llama is gated: accept its licence on the model's page first, then run `hf auth login`.\n")


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    return ["--data.train", "chats.jsonl", "--data.template", "llama3", "--data.cache", "cache"]


def test_a_model_that_is_an_id_of_the_hub(here, base, capsys, monkeypatch):
    from minisft.runs import lifecycle

    hub = "meta-llama/Llama-3.2-1B"
    for command, option in (([*here, "--model.path", hub], "--model.path"),
                            ([*here, "--model.path", str(base), "--model.tokenizer", hub], "--model.tokenizer")):
        assert main(["prepare", *command]) == 2
        assert capsys.readouterr().err.endswith(LLAMA.format(option))
    monkeypatch.setattr(lifecycle, "prepare", lambda *args, **kwargs: pytest.fail("the data was prepared"))
    assert lifecycle.main([*here, "--model.path", hub, "--model.tokenizer", str(base)]) == 2
    assert capsys.readouterr().err.endswith(LLAMA.format("--model.path"))
    assert main(["chat", hub]) == 2
    assert capsys.readouterr().err.endswith(LLAMA.format("").replace("pass  ", "pass "))


def test_a_data_set_that_is_an_id_of_the_hub(here, base, capsys):
    for key in ("train", "general"):
        given = [*here[2:], "--model.path", str(base), "--data.train", "chats.jsonl"]
        given += ["--data.general", "org/set-2.5"] if key == "general" else []
        given = [word if key == "general" or word != "chats.jsonl" else "org/set-2.5" for word in given]
        assert main(["prepare", *given]) == 2
        assert capsys.readouterr().err.endswith(
            f"If org/set-2.5 is on the Hugging Face hub, download it, and pass --data.{key} data/set-2.5/FILE:\n"
            "  hf download org/set-2.5 --local-dir data/set-2.5 --repo-type dataset\n")


@pytest.mark.parametrize("path", ["model", "a/b/c", "../b", "/a/b", "~/b", "a/", "nowhere/a.jsonl", "org/x.safetensors",
                                  "here/b", "a/b c", "a/b\n", "-a/b", "a/ş"])
def test_paths_that_are_no_ids(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert from_hub(path, "--model.path") == ""
