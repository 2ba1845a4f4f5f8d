"""No command writes over a file that it reads, over a device, or through a link; and standard streams may be closed."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import HERE, room_of_files

from minisft.__main__ import main
from minisft.errors import UserError
from minisft.reports.page import write


@pytest.fixture(scope="module")
def room(tmp_path_factory, base):
    return room_of_files(base, tmp_path_factory.mktemp("room"))


RECIPES = ("data.jsonl", "general.jsonl", "recipe.toml", "model/config.json", "model/tokenizer.json", "cache/*/*")
MODEL = ("model/config.json", "model/tokenizer.json", "model/model.safetensors")
CASES = {
    "prepare recipe.toml --dump {}": RECIPES, "prepare recipe.toml --json {}": RECIPES,
    "show recipe.toml --html {}": RECIPES, "plan recipe.toml --gpus 1 --json {}": RECIPES,
    "report run --out {}": ("run/config.toml", "run/metrics.jsonl", "run/status.json", "run/data.json",
                            "run/final/model.safetensors"),
    "eval model --template llama3 --choices sky_test.csv --instructions told.jsonl --data data.jsonl --json {}":
        ("sky_test.csv", "told.jsonl", "data.jsonl", *MODEL),
    "answer model --template llama3 --questions questions.jsonl --max-new-tokens 1 --json {} --out new.jsonl": (
        "questions.jsonl", *MODEL),
    "answer model --template llama3 --questions questions.jsonl --max-new-tokens 1 --out {}": (
        "questions.jsonl", *MODEL),
    "compare one.jsonl two.jsonl --questions questions.jsonl --out {}": ("one.jsonl", "two.jsonl", "questions.jsonl"),
    "compare --judge scores.jsonl --json {}": ("scores.jsonl",),
}
FORMS = {"itself": lambda file: file, "otherwise": lambda file: Path(".") / ".." / Path.cwd().name / file,
         "link": lambda file: link(os.symlink, file), "another name": lambda file: link(os.link, file)}


def link(how, file):
    name = Path(f"other-name{file.suffix}")
    name.unlink(missing_ok=True)
    how(file.resolve(), name)
    return name


def contents(room):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(room.rglob("*"))
            if file.is_file() and not file.is_symlink() and "other-name" not in file.name and file.name != "new.jsonl"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", CASES)
def test_nothing_that_is_read_is_written_over(command, form, room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    for pattern in CASES[command]:
        file = next(Path().glob(pattern))
        if form == "another name" and pattern in ("cache/*/*", "run/final/model.safetensors"):
            continue  # a new file takes that name, and the one that is read keeps its own
        before, output = contents(room), FORMS[form](file)
        assert main(command.format(output).split()) == 2, (command, file)
        told = capsys.readouterr()
        assert "is a link; name the file that it leads to" in told.err if form == "link" else (
            f"{output}: this command reads that file and would overwrite it; name another file" in told.err)
        assert told.out == ""
        assert contents(room) == before


@pytest.mark.parametrize("command", CASES)
def test_neither_devices_nor_folders_are_written_over(command, room, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(room)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for output, message in (("/dev/null", "is a device, a pipe or a socket; name a regular file"),
                            (tmp_path / "pipe", "is a device, a pipe or a socket; name a regular file"),
                            (tmp_path / "nowhere", "is a link; name the file that it leads to"),
                            ("model", "is a folder; name a file"), ("no/x", "folder no does not exist; create it")):
        assert main(command.format(output).split()) == 2
        assert f"{output}: {message}" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("command", CASES)
def test_a_new_file_is_written_and_then_replaced(command, room, monkeypatch, tmp_path):
    monkeypatch.chdir(room)
    (room / "new.jsonl").unlink(missing_ok=True)
    for _ in range(2):
        assert main(command.format(tmp_path / "x.jsonl").split()) == 0
    assert (tmp_path / "x.jsonl").stat().st_size
    assert [file.name for file in tmp_path.iterdir() if ".partial" in file.name] == []


def test_a_report_stays_in_the_runs_folder(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    assert main(["report", "run"]) == main(["report", "run"]) == 0
    (room / "run" / "report.html").unlink()
    (room / "run" / "report.html").symlink_to(room / "data.jsonl")
    assert main(["report", "run"]) == 2
    assert f"run/report.html: is a link; name the file that it leads to, {room}/data.jsonl" in capsys.readouterr().err
    (room / "run" / "report.html").unlink()


def test_two_outputs_are_two_files(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    assert main(["prepare", "recipe.toml", "--dump", "x", "--json", "./x"]) == 2
    assert "error: --json x: named twice, and one output would overwrite the other" in capsys.readouterr().err


def test_what_beside_a_page_would_be_written_over_is_named(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    shutil.copy("one.jsonl", "page.key.json")
    assert main(["compare", "page.key.json", "two.jsonl", "--questions", "questions.jsonl", "--out", "page"]) == 2
    assert "--out, its key: page.key.json: this command reads that file" in capsys.readouterr().err


def test_a_page_replaces_no_link_and_no_device(tmp_path):
    (tmp_path / "data").write_text("precious")
    (tmp_path / "page").symlink_to("data")
    for file in (tmp_path / "page", Path("/dev/null")):
        with pytest.raises(UserError, match=r"is a (link|device)"):
            write(file, "<html>")
    assert (tmp_path / "page").is_symlink()
    assert (tmp_path / "data").read_text() == "precious"


# ---- standard streams ------------------------------------------------------------------------------------------------

def shell(command, room, **options):
    return subprocess.run(["sh", "-c", command.replace("minisft", f"{sys.executable} -m minisft")], cwd=room, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, **options)


@pytest.mark.parametrize(("redirected", "code"), [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 4),
                                                  (">/dev/full 2>/dev/full", 4)])
def test_closed_and_full_streams(redirected, code, room):
    done = shell(f"minisft prepare recipe.toml --json closed.json {redirected}", room)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert json.loads((room / "closed.json").read_text())["documents"]


def test_a_name_that_is_no_text_is_an_error_of_one_line(room):
    done = shell("minisft report \"$(printf 'a\\377\\033[31m')\"", room)
    assert done.returncode == 2
    assert done.stderr == r"error: a\udcff\x1b[31m: no such folder; name the folder of a run (run.dir)" + "\n"


def test_ctrl_c_is_no_traceback(room, monkeypatch, capsys):
    from minisft import prepare

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(room)
    monkeypatch.setattr(prepare, "prepare", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    assert main(["prepare", "recipe.toml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- numbers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "message"), [
    ("plan r --tokens " + "9" * 400, "argument --tokens: " + "9" * 79 + "… was given; it must be a number from 1"),
    ("plan r --tokens 0.0001K", "--tokens: 0.0001K was given; it must be a number from 1"),
    ("plan r --hours-price -1", "--hours-price: -1 was given; it must be a number of dollars from 0 to a million"),
    ("plan r --hours-price nan", "--hours-price: nan was given; it must be a number of dollars"),
    ("plan r --gpus 1e3", "--gpus: 1e3 was given; it must be a whole number from 1 to 10^15"),
    ("plan r --utilisation 1.1", "--utilisation: 1.1 was given; it must be a number above 0, up to 1"),
    ("chat m --max-new-tokens 0", "--max-new-tokens: 0 was given; it must be a whole number from 1 to 10^15"),
    ("chat m --seed -1", "--seed: -1 was given; it must be a whole number from 0 to 10^15"),
    ("eval m --limit " + "9" * 30, "--limit: " + "9" * 30 + " was given; it must be a whole number from 1 to 10^15"),
    ("show r --index \x1b[31m", r"--index: \x1b[31m was given; it must be a whole number"),
])
def test_numbers_out_of_range_are_one_line(command, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(command.split(" "))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
