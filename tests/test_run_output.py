"""What a person reads while a run trains: its pace, what else it is doing, how it ended, what to do next."""

import errno
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import threading
import time
from collections import Counter

import pytest
from small_runs import HERE, launch, log, options, train
from test_forgetting import TEXTS
from test_whole_run import plant_nan

from minisft.__main__ import main as command
from minisft.runs import after, lifecycle, metrics
from minisft.runs.lifecycle import main

CONVERSATIONS = HERE / "oracles/conversations.jsonl"
STEP = re.compile(r"^step +(\d+)/(\d+)  (\S+) left  loss (\S+)  lr (\S+)  norm (\S+)  (\S+) tok/s  \S+ GiB  "
                  r"(\S+) s/step$", re.MULTILINE)


@pytest.fixture
def general(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text('{"text": "In spring the river rises and the mill turns."}\n' * 9)
    return file


def closing(printed):
    """The closing block, by its headings, and the commands at its end."""
    block = printed.split("the trained model")[1]
    *rows, commands = block.rstrip("\n").split("\n\n")
    return {line.split()[0]: line for line in "\n".join(rows).splitlines()[1:] if line}, commands.splitlines()


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?", text)]


# ---- lines and the closing block -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_in_a_pipe_print_each_line_once_and_end_with_the_figures_of_the_log(base, tmp_path, general):
    """The longest of the oracle's documents are too long here."""
    settings = {"data__eval": CONVERSATIONS, "data__general": general, "data__seq_len": 256, "train__max_steps": 8,
                "eval__every": 3, "eval__forgetting_bound": 0.01, "batch__packs": 2}
    with launch(base, tmp_path, ranks=2, **settings) as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert "\r" not in printed
    assert "\x1b" not in printed

    records, evals = log(tmp_path), log(tmp_path, "eval")
    steps = STEP.findall(printed)
    assert [(int(step), int(total)) for step, total, *_ in steps] == [(step, 8) for step in range(1, 9)]
    for (_, _, _, loss, rate, norm, *_), record in zip(steps, records, strict=True):
        assert float(loss) == pytest.approx(record["loss"], abs=6e-5)
        assert float(rate) == pytest.approx(record["lr"], rel=6e-3)
        assert float(norm) == pytest.approx(record["grad_norm"], rel=6e-3)
    said = Counter(line for line in printed.splitlines() if ": held-out loss on " in line)
    assert set(said.values()) == {1}
    assert len(said) == len(evals) == 2 * 4

    rows, commands = closing(printed)
    assert numbers(rows["steps"]) == [8, 8]
    tokens, targets, seconds = (sum(record[name] for record in records)
                                for name in ("tokens", "target_tokens", "seconds"))
    assert numbers(rows["tokens"]) == [tokens, targets, round(tokens / seconds)]
    documents = json.loads((HERE / "oracles/trl_curve.json").read_text())["documents"]
    lengths = [len(document["ids"]) for document in documents]
    assert numbers(rows["skipped"])[:2] == [sum(length > 256 for length in lengths), len(lengths)]
    for name in ("conversations", "general"):
        own = [record["loss"] for record in evals if record["name"] == name]
        assert numbers(rows[name])[:3] == pytest.approx([own[0], own[-1], own[-1] - own[0]], abs=6e-5)
    assert rows["general"].endswith("forgetting, within the bound of 0.01")
    assert "forgetting" not in rows["conversations"]
    wall, training = (60 * int(minutes) + int(rest) for minutes, rest in re.findall(r"(\d+):(\d+)", rows["time"]))
    assert wall >= training == int(seconds)
    assert [line.rpartition(" ")[2] for line in commands] == [f"{tmp_path}/run/final", f"{tmp_path}/run"]


def test_forgetting_over_the_bound_is_said_at_the_end(base, tmp_path, general, capsys):
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for bound, said in ((0.01, ", over the bound of 0.01"), (0, "")):
        folder = tmp_path / str(bound)
        train(base, folder, data__general=general, train__max_steps=3, optim__lr=0.1, batch__packs=1,
              eval__forgetting_bound=bound)
        rows, _ = closing(capsys.readouterr().out)
        before, after = (record["loss"] for record in log(folder, "eval"))
        assert after - before > 0.01  # or this test says nothing
        assert rows["general"].endswith(f"{after - before:+.4f}  forgetting{said}")


def test_steps_that_were_not_finite_and_a_second_start_are_counted(base, tmp_path, monkeypatch, capsys):
    settings = {"train__max_steps": 6, "batch__packs": 1, "checkpoint__every": 2}
    with monkeypatch.context() as patch:
        plant_nan(patch, {2, 3})
        patch.setattr(lifecycle, "finish", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(options(base, tmp_path, **settings, **{"checkpoint__keep": 0}))
    last = tmp_path / "run/checkpoints/step-000006"
    last.rename(tmp_path / "gone")
    capsys.readouterr()
    train(base, tmp_path, **settings)
    rows, _ = closing(capsys.readouterr().out)
    assert numbers(rows["skipped"]) == [2, 6]
    assert "their loss or gradient was not finite" in rows["skipped"]
    assert re.search(r"^time     \S+ since step 4, training \S+ over all starts$", rows["time"])
    assert numbers(rows["tokens"])[0] == sum(record["tokens"] for record in log(tmp_path))


# ---- the clock -------------------------------------------------------------------------------------------------------


def slow(monkeypatch, where, name):
    """Make this function take a second more."""
    function = getattr(where, name)

    def slowed(*args, **kwargs):
        time.sleep(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(where, name, slowed)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["evaluation", "checkpoint", "export"])
def test_the_pace_is_that_of_the_steps_alone(base, tmp_path, monkeypatch, capsys, what):
    """Each step is followed by a second of something else."""
    place, settings = {"evaluation": ((after, "heldout_loss"), {"data__eval": CONVERSATIONS, "eval__every": 1}),
                       "checkpoint": ((lifecycle.Saver, "save"), {"checkpoint__every": 1}),
                       "export": ((after, "export"), {"checkpoint__export_every": 1})}[what]
    slow(monkeypatch, *place)
    real = lifecycle.training_steps

    def steps_of_a_second(*args, **kwargs):
        for result in real(*args, **kwargs):
            time.sleep(1)
            yield result

    monkeypatch.setattr(lifecycle, "training_steps", steps_of_a_second)
    started = time.perf_counter()
    train(base, tmp_path, train__max_steps=4, batch__packs=1, **settings)
    took = time.perf_counter() - started
    steps = STEP.findall(capsys.readouterr().out)
    assert len(steps) == 4
    assert took > 7
    assert all(1 <= float(pace) < 1.7 for *_, pace in steps), steps
    assert [left for _, _, left, *_ in steps][1:] == ["00:02", "00:01", "00:00"]
    rates = [(float(rate.replace(",", "")), record) for (*_, rate, _), record in zip(steps, log(tmp_path), strict=True)]
    assert rates[0][0] == pytest.approx(rates[0][1]["tokens"], rel=0.45)  # in about a second


# ---- what is no step -------------------------------------------------------------------------------------------------


def test_without_a_terminal_long_work_has_a_line_now_and_then(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "SAY_EVERY", 0.0)
    train(base, tmp_path, train__max_steps=1, batch__packs=1, data__eval=CONVERSATIONS, eval__samples=2)
    told = capsys.readouterr()
    assert "\r" not in told.out + told.err
    for step in (0, 1):
        told_batches = re.findall(rf"^step {step}: held-out loss on conversations, batch (\d+) of 11$", told.out, re.M)
        assert told_batches == [str(done) for done in range(11)]
        assert f"\nstep {step}: answering 2 held-out questions, token 0 of 128\n" in told.out
    tensors = re.findall(r"writing \S+/run/final, tensor (\d+) of (\d+)\n", told.out)
    assert [int(done) for done, _ in tensors] == list(range(int(tensors[0][1])))
    monkeypatch.setattr(metrics, "SAY_EVERY", 3600.0)
    train(base, tmp_path / "quick", train__max_steps=1, batch__packs=1, data__eval=CONVERSATIONS, eval__samples=2)
    assert not re.search(r"batch \d|token \d|tensor \d", capsys.readouterr().out)


def screen(raw):
    """The lines that a terminal shows after it has printed `raw`."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", raw):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            column = 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_there_is_a_bar_and_other_work_leaves_nothing(base, tmp_path, columns):
    argv = options(base, tmp_path, train__max_steps=8, batch__packs=1, data__eval=CONVERSATIONS, eval__samples=1)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    program = [sys.executable, HERE / "planted.py", "long", "0", "8", *argv]  # 5 s a batch of the last evaluation
    process = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)})
    limit = threading.Timer(200, process.kill)
    limit.start()
    os.close(theirs)
    printed = b""
    while b"step 8: held-out loss on conversations, batch" not in printed:
        printed += os.read(ours, 65536)
    process.terminate()
    try:
        while piece := os.read(ours, 65536):
            printed += piece
    except OSError as error:
        if error.errno != errno.EIO:  # the other side is closed
            raise
    assert process.wait(timeout=60) == 75
    limit.cancel()
    os.close(ours)
    raw = printed.decode()
    assert re.search(r"step 8: held-out loss on conversations, batch \d+/11 \|[^|]+\| \d\d:\d\d left", raw)
    shown = screen(raw)
    assert not [line for line in shown if re.search(r"(token|batch|tensor) \d", line)]
    assert [line.split(" conv")[0] for line in shown if "held-out loss" in line] == ["step 0: held-out loss on"]
    assert shown[-2:] == ["saved step 8; the same command resumes from there", ""]
    figures = r"00:00 left +loss \d\.\d{4} +lr 1\.00e-03 +norm \d\.\d\d +[\d,]+ tok/s +\d\.\d GiB"
    assert [line for line in shown if re.fullmatch(
        rf"8/8 {figures}" if columns == 80 else rf"step 8/8 \|█+\| {figures} +\d+\.\d\d s/step", line)]
    assert max(map(len, shown[shown.index(next(line for line in shown if "held-out loss" in line)) :])) <= columns


# ---- what to do next -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"data__template": "text"}, {"data__template": "mine"}, {"lora__rank": 2}])
def test_the_commands_at_the_end_work(base, tmp_path, capsys, settings):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a folder"
    if settings.get("data__template") == "mine":
        shipped = (HERE.parent / "minisft/data/templates.toml").read_text()
        own = re.search(r"^\[alpaca\].*?(?=^\[)", shipped, re.MULTILINE | re.DOTALL)[0]
        (tmp_path / "own.toml").write_text(own.replace("[alpaca]", "[mine]"))
        settings = {**settings, "data__templates": tmp_path / "own.toml"}
    train(base, folder, train__max_steps=1, batch__packs=1, **settings)
    printed = capsys.readouterr().out
    _, commands = closing(printed)
    assert len(commands) == 2
    for line, more in zip(commands, (["--prompt", "hi", "--max-new-tokens", "2"], []), strict=True):
        words = shlex.split(line)
        assert command([*words[words.index("minisft") + 1 :], *more]) == 0
    assert (folder / "run/report.html").exists()
    if "lora__rank" in settings:
        assert f"{folder}/run/adapter: the adapter alone" in printed
        assert command(["chat", f"{folder}/run/adapter", "--prompt", "hi", "--max-new-tokens", "2"]) == 0


def test_without_an_export_nothing_is_said_of_a_model(base, tmp_path, capsys):
    train(base, tmp_path, train__max_steps=1, batch__packs=1, run__export="false")
    printed = capsys.readouterr().out
    assert "final" not in printed
    assert " chat " not in printed
    assert printed.splitlines()[-1].endswith(f"report {tmp_path}/run")
