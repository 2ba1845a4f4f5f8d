"""The page of a run has every figure, its numbers are the log's, and nothing from the run can act on it."""

import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import CONTRAST, browser, in_browser

from minisft.__main__ import main
from minisft.errors import UserError
from minisft.reports import drawing, run_report
from minisft.reports.logged_run import EventFiles, LoggedRun, column, read_log, read_runs
from minisft.reports.page import relative

pytest.importorskip("matplotlib")

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;$x_{$"
CONFIG = """
[model]
path = "base/model"
[data]
train = ["chat.jsonl", "code.jsonl"]
seq_len = 128
[batch]
packs = 4
[optim]
lr = 1e-4
schedule = "linear"
clip_norm = 0.5
[eval]
forgetting_bound = 0.25
"""
SOURCE = {"weight": 1.0, "epoch": {"documents": 30, "tokens": 3000, "target_tokens": 900}}
DATA = {"seq_len": 128, "overlong": "drop", "packs": 10, "packs_per_step": 4, "steps_per_epoch": 3, "total_steps": 40,
        "packing_efficiency": 0.9375, "pack_fill": [0] * 18 + [3, 7], "replay": [],
        "train": [{"name": "chat", **SOURCE}, {"name": "code", **SOURCE}],
        "epoch_documents": 60, "epoch_tokens": 6000, "epoch_target_tokens": 1800,
        "lengths": [{"from": 1, "to": 64, "kept": 50, "too_long": 0},
                    {"from": 65, "to": 128, "kept": 10, "too_long": 0},
                    {"from": 129, "to": 256, "kept": 0, "too_long": 4}]}
SECTIONS = ["Loss", "Forgetting", "Learning rate and gradient", "Throughput and its losses", "Data",
            "Answers", "Environment"]
TITLES = ["training loss", "loss on general", "rise of the loss on general", "learning rate", "gradient norm",
          "tokens per second", "seconds per step", "documents by length", "packs by fill",
          "share of trained tokens, running mean"]


def steps(count=40, skipped=()):
    rng = np.random.default_rng(0)
    for step in range(1, count + 1):
        seconds = 0.5 + (step % 10 == 0)
        yield {"kind": "train", "step": step, "epoch": 0, "loss": None if step in skipped else 3 / step, "lr": 1e-4,
               "grad_norm": None if step in skipped else float(rng.uniform(0.1, 2)), "tokens": 200 + step,
               "target_tokens": 100 + step, "seconds": seconds, "tokens_per_second": (200 + step) / seconds,
               "memory_gib": 1 + step / 100, "sources": {"chat": 60, "code": 40 + step},
               **({"skipped": True, "documents": []} if step in skipped else {})}


def evaluations(name="general"):
    return [{"kind": "eval", "step": step, "name": name, "loss": 2 + step / 100, "target_tokens": 50, "seconds": 2.0,
             "forgetting": step / 100} for step in (0, 20, 40)]


def samples(answers=("eh", "Valletta."), prompt="Capital of Malta?"):
    return [{"kind": "sample", "step": step, "name": "general", "prompt": prompt, "answer": answer,
             "reference": "Valletta."} for step, answer in zip((0, 40), answers, strict=True)]


@pytest.fixture
def write_run(tmp_path):
    def write(name="run", records=None, config=CONFIG, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / "config.toml").write_text(config)
        records = [*steps(), *evaluations(), *samples()] if records is None else records
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        contents = {"data": DATA, "environment": {"commit": "abc", "gpus": ["H9", "H9"], "packages": {"torch": "2"}},
                    "status": {"state": "done", "exit_code": 0, "step": 40, "error": ""}, **files}
        for file, content in contents.items():
            if content is not None:
                (folder / f"{file}.json").write_text(json.dumps(content))
        return folder
    return write


class Page(HTMLParser):
    """Tags and attributes, headings, the cells of each table row, and the text of figures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.headings, self.rows, self._open = set(), [], [], [], []
        self.labels, self.keys = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "use", "path", "rect"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text):
        if self._open[-1:] == ["span"]:
            self.keys.append(text)
        if self._open[-1:] in (["text"], ["tspan"]):
            self.labels.append(text.strip())
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += text
        if self._open[-1:] == ["h2"]:
            self.headings.append(text)

    def row(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)


def report(*folders, out=None):
    assert main(["report", *map(str, folders), *(["--out", str(out)] if out else [])]) == 0
    return Page((out or folders[0] / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, which take most of the time."""
    for name in ("lines", "histogram"):
        monkeypatch.setattr(run_report, name, lambda *args, **named: "<svg></svg>")


def failing(capsys, *argv):
    assert main(["report", *map(str, argv)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_every_figure_is_there(write_run):
    page = report(write_run(records=[*steps(skipped=(3, 7)), *evaluations(), *samples()]))
    assert page.headings == SECTIONS
    assert set(TITLES) <= set(page.labels)
    assert {"optim.clip_norm = 0.5", "eval.forgetting_bound = 0.25", "left out", "skipped step"} <= set(page.labels)
    assert {"steps at their pace 66.7%", "trained 28.1%", "chat", "code 50.0%"} <= set(page.keys)


def test_the_numbers_are_the_logs(write_run, undrawn):
    page = report(write_run(records=[*steps(skipped=(3, 7)), *evaluations()]))
    assert page.row("state") == ["done"]
    assert page.row("model") == ["base/model"]
    assert page.row("data") == ["chat, code"]
    assert page.row("steps") == ["40 of 40, 2 skipped"]
    tokens, trained = 40 * 200 + 820, 40 * 100 + 820  # 1 + 2 + ... + 40 = 820
    assert page.row("tokens") == [f"{tokens:,}, {trained:,} of them trained"]
    last = sum(3 / step for step in range(31, 41)) / 10
    assert page.row("training loss") == [f"3.0000 → {last:.4f} (mean of the last 10 steps)"]
    assert page.row("loss on general") == ["2.0000 → 2.4000"]
    assert page.row("wall time") == ["30.0 s: 24.0 s in steps, 6.0 s in held-out losses"]  # 40 halves and four wholes
    assert page.row("forgetting on general") == ["+0.4000 nats, above the bound of 0.25"]
    assert page.row("batch") == ["4 packs × 128 tokens"]
    assert page.row("learning rate") == ["0.0001, linear"]
    assert page.row("speed") == [f"{tokens / 24:,.0f} tokens/s, {trained / 24:,.0f} of them trained"]
    assert page.row("memory") == ["at most 1.40 GiB"]
    assert page.row("gpus") == ["2 × H9"]


def test_shares_of_time_and_room(write_run):
    [run] = read_runs([write_run()])
    assert run_report.time_shares(run) == pytest.approx({"steps at their pace": 20 / 30, "steps beyond it": 4 / 30,
                                              "held-out losses": 6 / 30})
    room = 128 * (13 * 10 + 4)  # thirteen epochs of 4 + 4 + 2 packs, and the first step of another
    assert run_report.token_shares(run) == pytest.approx({"trained": 4820 / room, "context": 4000 / room,
                                               "empty": 1 - 8820 / room})


def test_the_page_runs_nothing_and_loads_nothing(write_run):
    config = CONFIG.replace("base/model", HOSTILE)
    data = {**DATA, "train": [{"name": HOSTILE, **SOURCE}, {"name": f"_{HOSTILE}", **SOURCE}]}
    records = [{**record, "sources": {HOSTILE: 3, "_$b_{$": 4}} for record in steps()]
    folder = write_run("a<b>&", [*records, *evaluations(HOSTILE), *samples((HOSTILE, HOSTILE), HOSTILE)], config,
                       data=data, environment={"command": HOSTILE},
                       status={"state": HOSTILE, "error": HOSTILE})
    (folder / "profile").mkdir()
    (folder / "profile" / "table.txt").write_text(HOSTILE)
    page, text = report(folder), (folder / "report.html").read_text(encoding="utf-8")
    assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "image", "foreignobject"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not re.findall(r"url\((?!#)|@import|https?:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert page.row("model") == [HOSTILE]
    assert page.row("command") == [HOSTILE]
    assert page.row("step 40") == [HOSTILE]
    assert f"loss on {HOSTILE}"[:39] + "…" in page.labels
    assert HOSTILE in page.keys
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names)) > 0
    used = set(re.findall(r"url\(#(\w+)\)", text)) | {v[1:] for n, v in page.attributes if n.endswith("href")}
    assert used <= set(names)


def test_colours_are_the_pages(write_run):
    """Every colour is a variable that both the light and the dark style set."""
    folder = write_run()
    report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    style, body = text.split("</style>", 1)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b|\brgb", body)
    light, dark = re.sub(r"@media.*?}\s*}", "", style, flags=re.S), "".join(re.findall(r"@media.*?}\s*}", style, re.S))
    for variable in set(re.findall(r"var\((--(?!k)\w+)\)", body)):
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


def test_answers_stand_side_by_side(write_run, undrawn):
    page = report(write_run())
    assert page.row("expected") == ["Valletta."]
    assert page.row("step 0") == ["eh"]
    assert page.row("step 40") == ["Valletta."]
    assert [value for name, value in page.attributes if name == "class"].count("text right") == 1


def test_several_runs_are_overlaid(write_run, tmp_path):
    one = write_run("one/run")
    two = write_run("two/run", [*steps(20), *evaluations("other"), *samples(("no", "no"))],
                    status={"state": "failed", "error": "disk full"})
    page = report(one, two, out=tmp_path / "both.html")
    assert page.row("state") == ["done", "failed: disk full"]
    assert page.row("steps") == ["40 of 40", "20 of 40"]
    assert page.row("loss on other") == ["", "2.0000 → 2.4000"]
    assert page.keys.count("two/run") >= 4
    assert page.row("forgetting on other") == ["", "+0.4000 nats, above the bound of 0.25"]
    assert page.labels.count("documents by length") == 1, "the data are the same"
    assert page.row("two/run, step 40") == ["no"]
    assert not (one / "report.html").exists()


def test_only_the_settings_that_differ_are_listed(write_run, tmp_path, undrawn):
    other = CONFIG.replace("lr = 1e-4", "lr = 3e-4") + "every = 5\n"
    one, two = write_run("one/run"), write_run("two/run", config=other)
    page = report(one, two, out=tmp_path / "both.html")
    [head] = [i for i, row in enumerate(page.rows) if row[0] == "optim.lr"]
    assert page.rows[head : head + 2] == [["optim.lr", "0.0001", "0.0003"], ["eval.every", "", "5"]]
    assert not [row for row in page.rows if row[0] in ("optim.schedule", "data.seq_len", "model.path")]
    same = (tmp_path / "same.html")
    (two / "config.toml").write_text(CONFIG)
    report(one, two, out=same)
    assert "None: all runs have the same." in same.read_text(encoding="utf-8")


@pytest.mark.parametrize(("path", "shown"), [
    ("/home/ann/models/Llama 3/8b", "~/models/Llama 3/8b"), ("/Users/ann/x.jsonl", "~/x.jsonl"),
    ("/root/runs/a/final", "~/runs/a/final"), ("/mnt/disk/ann/llama/8b", "…/llama/8b"),
    ("runs/a/final", "runs/a/final"), ("CWD/runs/a/final", "runs/a/final")])
def test_no_folder_of_this_machine_is_on_a_page(write_run, monkeypatch, tmp_path, path, shown):
    """Not in the table, the configuration, an error, the command or a heading."""
    monkeypatch.chdir(tmp_path)
    path = path.replace("CWD", str(tmp_path))
    config = CONFIG.replace('"base/model"', f'"{path}"')
    one, two = (write_run(f"{name}/run", config=config, environment={"command": f"{path.replace(' ', '')} --x"},
                          status={"state": "failed", "error": f"cannot read {path.replace(' ', '')}: no space"})
                for name in "ab")
    page = report(one, two, out=tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert page.row("model") == [shown] * 2
    assert page.row("state") == [f"failed: cannot read {shown.replace(' ', '')}: no space"] * 2
    assert page.row("command") == [f"{shown.replace(' ', '')} --x"] * 2
    assert f"path = &quot;{shown}&quot;" in text
    assert not re.search("/ann|ann/|/mnt|/root", text)
    assert str(tmp_path) not in text


@pytest.mark.parametrize("text", ["https://a.b/c/d", "and/or/not", "</p></b>", "a /b", "…/a/b", "1/2/3", "/"])
def test_what_is_no_path_stays(text):
    assert relative(text) == text


def readings(svg):
    return [re.sub("<.*?>", "", text) for text in re.findall('<g class="at">.*?(<text.*?</text>)', svg)]


def test_the_pointer_reads_the_log():
    x, y = np.arange(1.0, 1001), np.linspace(5, 1, 1000)
    y[500] = np.nan
    curve = drawing.Curve("loss", x, y, mean=y + 1)
    texts = readings(drawing.lines(drawing.Panel("loss", [curve])))
    assert len(texts) == drawing.STRIPS
    assert texts[0] == "step 1 5 (mean 6)"
    assert texts[-1] == "step 1,000 1 (mean 2)"
    for text in texts:
        step, value, mean = map(float, re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))
        assert (value, mean) == pytest.approx((y[int(step) - 1], y[int(step) - 1] + 1), rel=1e-3)
    crosses = drawing.Curve("skipped step", x[500:501], np.array([1.0]), style="crosses")
    few = [drawing.Curve("a", x[:2], y[:2]), drawing.Curve("b", x[1:3] + 0.0, 20_000 + y[1:3]), crosses]
    assert readings(drawing.lines(drawing.Panel("both", few))) == [
        "step 1 5", "step 2 4.996 20,005", "step 3 20,005", "step 501 skipped step"]
    bars = drawing.histogram("h", ["≤1", "≤2"], {"kept": [3, 0], "cut": [0, 1]}, xlabel="tokens")
    assert readings(bars) == ["≤1: 3 kept, 0 cut", "≤2: 0 kept, 1 cut"]


@pytest.mark.parametrize("step", [0, 1, 20])
def test_one_evaluation_is_a_dot_with_its_step_and_value(step):
    svg = drawing.lines(drawing.Panel("loss", [drawing.Curve("r", np.array([float(step)]), np.array([2.34567]))]))
    labels = re.findall("<text[^>]*>([^<]*)</text>", svg.partition('<g class="at">')[0])
    assert labels == [str(step), "step", "2.346", "loss"]
    assert svg.count("<use") >= 2, "a mark for the point besides that of a tick"


@pytest.mark.parametrize("last", [1, 2, 3, 7, 12, 100])
def test_ticks_are_whole_steps(last):
    x = np.arange(last + 1.0)
    svg = drawing.lines(drawing.Panel("loss", [drawing.Curve("r", x, x)]))
    ticks = re.findall("<text[^>]*>([^<]*)</text>", svg.partition('<g class="at">')[0].partition(">step<")[0])
    assert all(tick.isdigit() for tick in ticks)
    assert len(ticks) >= 2


LABELS = """[...document.querySelectorAll("svg text")].map(
    (t) => [t.textContent, parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a])"""
BOXES = """[...document.querySelectorAll(".panels svg")].map((svg) => {
    const box = svg.getBoundingClientRect(); return [box.left, box.top + scrollY, box.right, box.bottom + scrollY] })"""
SHOWN = """[...document.querySelectorAll(".at text")].filter((t) => getComputedStyle(t).visibility === "visible")
    .map((t) => t.textContent)"""


@in_browser
def test_a_phone_shows_a_page_of_readable_panels(write_run, tmp_path):
    records = [*steps(skipped=(3,)), *evaluations("a-longer-name-of-a-source"), *evaluations("b"), *evaluations("c"),
               *samples()]
    one, two = write_run("one/run", records), write_run("two/run", [*steps(20), *evaluations("b")])
    report(one)
    report(one, two, *(write_run(f"{i}/run", list(steps(4))) for i in range(4)), out=tmp_path / "both.html")
    with browser() as tab:
        for file in (one / "report.html", tmp_path / "both.html"):
            for dark in (False, True):
                tab.requests.clear()
                tab.open(file, width=400, dark=dark, touch=True)
                assert tab.requests == [file.as_uri()]
                assert tab.ask("document.documentElement.scrollWidth") <= 400
                assert min(size for _, size in tab.ask(LABELS)) >= 11
                boxes = tab.ask(BOXES)
                assert len(boxes) > 8
                for (left, _, right, bottom), below in pairwise(boxes):
                    assert (below[0], below[1] >= bottom, right <= 400) == (left, True, True)
                contrast, text = tab.ask(CONTRAST)
                assert contrast >= 4.5, text


@in_browser
def test_a_wide_screen_leaves_no_fourth_panel_alone(write_run):
    folder = write_run(records=[*steps(), *(record for name in "abc" for record in evaluations(name))])
    report(folder)
    with browser() as tab:
        tab.open(folder / "report.html", width=1400)
        assert tab.ask("document.documentElement.scrollWidth") <= 1400
        tops = [top for _, top, _, _ in tab.ask(BOXES)]
        assert [tops[:4].count(top) for top in tops[:4]] == [2] * 4  # training loss, a, b, c
        assert [tops[4:7].count(top) for top in tops[4:7]] == [3] * 3  # their forgetting
        assert min(size for _, size in tab.ask(LABELS)) >= 11


@in_browser
def test_a_pointer_shows_one_value(write_run):
    folder = write_run(records=[*steps(3), *evaluations()])
    report(folder)
    with browser() as tab:
        tab.open(folder / "report.html", width=400)
        assert tab.ask(SHOWN) == []
        left, top, right, bottom = tab.ask(BOXES)[0]
        for share, wanted in ((0.2, "step 1 3"), (0.6, "step 2 1.5"), (0.97, "step 3 1")):
            tab.point(left + share * (right - left), (top + bottom) / 2)
            assert tab.ask(SHOWN) == [wanted]
        tab.point(1, 1)
        assert tab.ask(SHOWN) == []
        tab.open(folder / "report.html", width=400, touch=True)
        left, top, right, bottom = tab.ask(BOXES)[0]
        tab.tap(left + 0.6 * (right - left), (top + bottom) / 2)
        assert tab.ask(SHOWN) == ["step 2 1.5"]


@pytest.mark.parametrize("records", [
    [], list(steps(1)), list(steps(3, skipped=(1, 2, 3))), evaluations()[:1], samples()[:1],
    [{"kind": "train", "step": 1}], [{"kind": "train", "step": 1, "loss": "x", "seconds": None, "lr": True}],
    [{"kind": "other", "step": 1}]])
def test_runs_that_have_barely_begun(write_run, records):
    folder = write_run(records=records, status={"state": "running", "error": ""})
    assert report(folder).row("state")[0].startswith("dead; last written 2")  # nobody holds its lock
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = report(folder)
    assert page.row("state")[0].startswith("running; last written 2")
    assert report(folder).row("state")[0].startswith("dead; last written 2")
    if not records:
        assert page.headings == ["Loss", "Data", "Environment"]


def test_a_run_whose_numbers_ended(write_run, undrawn):
    """Figures of before do not stand as those of the end."""
    evals = evaluations()
    evals[-1] = {key: value for key, value in evals[-1].items() if key != "forgetting"} | {"loss": None}
    page = report(write_run(records=[*steps(skipped=range(31, 41)), *evals]))
    assert page.row("training loss") == ["3.0000 → not finite (mean of the last 10 steps)"]
    assert page.row("forgetting on general") == ["none at the last evaluation"]


def test_a_log_that_lost_steps(write_run, undrawn):
    page = report(write_run(records=[record for record in steps(skipped=(3,)) if record["step"] not in (7, 8)]))
    assert page.row("steps") == ["40 of 40, 1 skipped, 2 lost from the log"]


def test_a_run_that_is_being_written(write_run, undrawn):
    """The last line is cut off, and a repeated step replaces the earlier one."""
    folder = write_run(records=[*steps(10), {**next(steps(1)), "step": 9, "loss": 7.0}], data=None, environment=None,
                       status={"state": "running"})
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "st')
    page = report(folder)
    assert page.row("steps") == ["10"]
    losses = [3 / step for step in range(1, 11)]
    losses[8] = 7.0
    assert page.row("training loss") == [f"3.0000 → {np.mean(losses):.4f} (mean of the last 10 steps)"]


def test_a_folder_without_a_run_is_refused(write_run, tmp_path, capsys):
    assert failing(capsys, tmp_path / "none") == (
        f"error: {tmp_path / 'none'}: no such folder; name the folder of a run (run.dir)")
    assert "not a run folder (no status.json, metrics.jsonl or config.toml)" in failing(capsys, tmp_path)
    run = write_run()
    assert "a run is named twice" in failing(capsys, run, run)
    assert "unknown argument --colour" in failing(capsys, run, "--colour")
    assert "does not exist; create it first" in failing(capsys, run, "--out", tmp_path / "no" / "x.html")
    assert "choose one of them" in failing(capsys, run, "--out", tmp_path / "x", "--tensorboard", tmp_path / "y")
    (run / "status.json").write_text("[1]")
    assert "status.json: it is [1], expected an object; delete this file" in failing(capsys, run)
    (run / "status.json").write_text("{")
    assert "status.json: not JSON" in failing(capsys, run)
    (run / "config.toml").write_text("=")
    assert "config.toml: not TOML" in failing(capsys, run)
    with open(run / "metrics.jsonl", "a") as log:
        log.write("nonsense\n")
    (run / "config.toml").unlink()
    (run / "status.json").unlink()
    assert failing(capsys, run).endswith(
        f"metrics.jsonl:{40 + 3 + 2 + 1}: not a metrics record (not JSON); fix or delete this line: 'nonsense'")


@pytest.mark.parametrize(("file", "text", "expected"), [
    ("data.json", {**DATA, "lengths": [{**DATA["lengths"][0], "kept": "x"}]},
     "lengths[0].kept is 'x', expected a whole number; delete this file to get a report without it"),
    ("data.json", {**DATA, "packs": 1.5}, "packs is 1.5, expected a whole number"),
    ("data.json", {**DATA, "packing_efficiency": True}, "packing_efficiency is True, expected a number"),
    ("data.json", {**DATA, "train": {"a": 1}}, "train is {'a': 1}, expected a list"),
    ("data.json", {**DATA, "replay": [{"name": "web"}]}, "epoch is missing in replay[0]"),
    ("data.json", {"seq_len": 128}, "overlong is missing"),
    ("data.json", '{"overlong": "\\ud800"}', "not JSON ('utf-8' codec can't encode"),
    ("data.json", "[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    ("config.toml", "optim = 3", "optim is 3, expected an object"),
    ("config.toml", "eval.forgetting_bound = 'low'", "eval.forgetting_bound is 'low', expected a number"),
    ("config.toml", "optim.lr = 'fast'", "optim.lr is 'fast', expected a number"),
    ("config.toml", "batch.packs = 0.5", "batch.packs is 0.5, expected a whole number"),
    ("config.toml", "lora = {rank = 8.5}", "lora.rank is 8.5, expected a whole number")])
def test_a_broken_file_is_one_line(write_run, capsys, file, text, expected):
    run = write_run()
    (run / file).write_text(text if isinstance(text, str) else json.dumps(text))
    assert failing(capsys, run).startswith(f"error: {run / file}: {expected}")


@pytest.mark.parametrize(("line", "wrong"), [
    ('{"kind": "x", "step": 1e3}', "step is 1000.0, expected a whole number"),
    ('{"kind": "x", "step": true}', "step is True, expected a whole number"),
    ('{"kind": "x", "step": 9223372036854775808}', "step is 9223372036854775808, expected a whole number"),
    ('{"kind": "train"}', "step is missing"), ('{"step": 1}', "kind is missing"),
    ('{"kind": "x", "step": 1, "sources": 3}', "sources is 3, expected an object"),
    ('{"kind": "x", "step": 1, "sources": {"": "b"}}', "sources[0] is 'b', expected a number"),
    ('{"kind": "train", "step": 1}', "tokens is missing"),
    ('{"kind": "eval", "step": 1, "name": "a", "target_tokens": ""}', "target_tokens is '', expected a whole number"),
    ('{"kind": "eval", "step": 1, "name": "a", "target_tokens": 2, "loss": "b"}', "loss is 'b', expected a number"),
    ('{"kind": "x", "step": 1, "lr": 1e999}', "not JSON"), ('{"kind": "x", "step": 1, "name": "\\udc00"}', "not JSON"),
    ('{"kind": "x", "step": 1, "step": 2}', "not JSON"), ("[" * 100_000, "not JSON"),
    ("[1]", "it is [1], expected an object")])
def test_a_broken_record_is_one_line(write_run, capsys, line, wrong):
    """A page needs a step; a run that resumes needs more, and refuses the same in the same words."""
    run = write_run(records=[])
    (run / "metrics.jsonl").write_text(f"{line}\n")
    said = f"{run / 'metrics.jsonl'}:1: not a metrics record ({wrong}); fix or delete this line: {line[:80]!r}"
    if wrong.startswith(("kind", "tokens", "target_tokens", "loss")) or "1e999" in line:
        assert main(["report", str(run), "--out", str(run / "page.html")]) == 0
    else:
        assert failing(capsys, run) == f"error: {said}"
    with pytest.raises(UserError) as error:
        read_log(run)
    assert str(error.value) == said


def places(value, path=()):
    """The paths of everything within `value`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_any_data_json_gives_a_page_or_one_line(write_run, undrawn):
    run = write_run(records=[*steps(3)])
    small = {**DATA, "lengths": DATA["lengths"][:1], "pack_fill": [0, 7]}
    missing, pages = object(), 0
    for *path, last in places(small):
        for other in (missing, None, "x", 0, -1, float("nan"), 10**400, True, [], [None], {}):
            data = json.loads(json.dumps(small))
            within = data
            for key in path:
                within = within[key]
            if other is missing:
                del within[last]
            else:
                within[last] = other
            (run / "data.json").write_text(json.dumps(data))
            try:
                pages += run_report.page(read_runs([run])).count("<h2>Environment")
            except UserError as error:
                assert str(error).startswith(f"{run / 'data.json'}: ")  # noqa: PT017
    assert pages > 80


@pytest.mark.parametrize("change", [{"lengths": [], "train": [], "pack_fill": []},
                                    {"pack_fill": [0] * 20, "epoch_tokens": 0, "packs": 0, "seq_len": 0}])
def test_empty_data_is_drawn(write_run, change):
    assert "Data" in report(write_run(records=list(steps(2)), data={**DATA, **change})).headings


def test_without_matplotlib(write_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("drawing", "run_report"):
        monkeypatch.delitem(sys.modules, f"minisft.reports.{name}")
    assert failing(capsys, write_run()) == (
        "error: figures need matplotlib, which is not installed; pip install -e '.[plot]'")


def test_tensorboard(write_run, tmp_path, capsys):
    """Read back by TensorBoard itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, out = write_run(records=[*steps(skipped=(3,)), *evaluations(), *samples()]), tmp_path / "events"
    assert main(["report", str(run), "--tensorboard", str(out)]) == 0
    events = accumulator.EventAccumulator(str(out / "run"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == pytest.approx({step: 3 / step for step in range(1, 41) if step != 3})
    assert found["eval/general/loss"] == pytest.approx({0: 2.0, 20: 2.2, 40: 2.4})
    assert found["train/sources/code"][40] == 80
    assert f"{sum(map(len, found.values())):,} values" in capsys.readouterr().out
    assert len([tag for tag in events.Tags()["tensors"] if tag.startswith("sample/general/")]) == 2
    (out / "run" / "events.out.tfevents.1.host.1.0").write_bytes(b"")
    assert "holds event files of another program" in failing(capsys, run, "--tensorboard", out)


def scalars(folder):
    """Tag -> [(step, value)] as TensorBoard shows them, which drops what a later file purges."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return ({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]},
            {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]})


def test_tensorboard_again_and_while_the_log_grows_or_is_rewound(write_run, tmp_path):
    """However the log came to be what it is, TensorBoard shows it once."""
    pytest.importorskip("tensorboard")
    whole = sorted([*steps(skipped=(3,)), *evaluations(), *samples()], key=lambda record: record["step"])
    run, log = write_run(records=whole), tmp_path / "run" / "metrics.jsonl"
    once = tmp_path / "once"
    assert main(["report", str(run), "--tensorboard", str(once)]) == 0
    expected = scalars(once / "run")
    assert main(["report", str(run), "--tensorboard", str(once)]) == 0
    assert scalars(once / "run") == expected
    lines = log.read_text().splitlines(keepends=True)
    files = EventFiles(tmp_path / "live")
    other = [line.replace('"loss": ', '"loss": 7') for line in lines[30:35]]  # steps of an abandoned future
    for seen in (lines[:1], lines[:20], [*lines[:30], *other], lines[:30], lines):
        log.write_text("".join(seen))
        files.update(read_runs([run])[0])
    assert scalars(tmp_path / "live") == expected


def test_tensorboard_follows_a_run_to_its_end(write_run, tmp_path):
    pytest.importorskip("tensorboard")
    run = write_run(records=list(steps(9)))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    (run / "status.json").write_text(json.dumps({"state": "running", "exit_code": None, "step": 3, "error": ""}))
    command = [sys.executable, "-m", "minisft", "report", run, "--tensorboard", tmp_path / "live", "--follow", "0.1"]
    with open(run / ".lock", "wb") as lock:  # or it would count as killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        while not list(tmp_path.glob("live/run/*")):
            time.sleep(0.05)
        (run / "metrics.jsonl").write_text("".join(lines))
        (run / "status.json").write_text(json.dumps({"state": "done", "exit_code": 0, "step": 9, "error": ""}))
        assert process.communicate(timeout=60)[0].startswith(f"{tmp_path / 'live' / 'run'}: ")
    assert process.returncode == 0
    assert [step for step, _ in scalars(tmp_path / "live" / "run")[0]["train/loss"]] == list(range(1, 10))


def test_follow_is_for_tensorboard(write_run, capsys):
    assert failing(capsys, write_run(), "--follow") == "error: --follow goes with --tensorboard"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308, -1e308, 10**400, 2**63 - 1])
@pytest.mark.parametrize("name", ["loss", "lr", "grad_norm", "tokens", "target_tokens", "seconds", "tokens_per_second",
                                  "memory_gib", "mfu"])
@pytest.mark.filterwarnings("error")
def test_a_figure_that_is_not_a_number_is_a_gap(name, value):
    records = [{**record, **({name: value} if record["step"] == 2 else {})} for record in steps(4)]
    evals = [{"step": 1, name: value}, {"step": 2, name: 1.0}]
    run = LoggedRun("r", {}, "", DATA, {}, {}, records, {"h": evals}, [], "", 0.0)
    kept = [records[i].get(name, np.nan) for i in (0, 2, 3)]
    assert run.column(name)[[0, 2, 3]] == pytest.approx(kept, nan_ok=True)
    assert np.isnan(run.column(name)[1])
    assert np.isnan(column(evals, name)[0])
    assert math.isfinite(run.total(name))
    run_report._summary([run])
    run_report.time_shares(run)
    run_report.token_shares(run)


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e308", "9223372036854775807", "-1e400"])
@pytest.mark.parametrize("field", ["step", "sources"])
def test_a_record_without_a_valid_step_is_refused(write_run, capsys, value, field):
    run = write_run()
    record = {"kind": "train", "step": 1, **({"step": "@"} if field == "step" else {"sources": {"a": "@"}})}
    (run / "metrics.jsonl").write_text(json.dumps(record).replace('"@"', value) + "\n")
    assert re.search(r"metrics.jsonl:1: not a metrics record \(.+\); fix or delete this line: .", failing(capsys, run))


def test_only_regular_files_are_opened(write_run, tmp_path, capsys):
    run = write_run()
    for name in ("metrics.jsonl", "status.json", "config.toml", "data.json", "environment.json"):
        text = (run / name).read_text() if (run / name).exists() else None
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        assert f"{name}: not a regular file; delete it to get a report without it" in failing(capsys, run)
        (run / name).unlink()
        (run / name).write_text(text or "")


@pytest.mark.parametrize("name", ["\udcff", "a\x1b[31m"])
def test_tensorboard_takes_only_names_that_are_text(write_run, tmp_path, capsys, name):
    pytest.importorskip("tensorboard")
    assert failing(capsys, write_run(), "--tensorboard", tmp_path / name).endswith(
        f"{repr(name)[1:-1]}/run: TensorBoard does not accept this name; choose another folder")


def test_infinite_numbers_are_not_scalars(write_run, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    records = [{"kind": "train", "step": 1, "loss": 10**400, "lr": 1.0, "seconds": math.inf}]
    assert main(["report", str(write_run(records=records)), "--tensorboard", str(tmp_path / "events")]) == 0
    assert ": 1 values" in capsys.readouterr().out


def test_tensorboard_is_an_extra(write_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert failing(capsys, write_run(), "--tensorboard", tmp_path / "events") == (
        "error: event files need tensorboard, which is not installed; pip install -e '.[tensorboard]'")


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_running_mean(window):
    values = np.random.default_rng(window).normal(size=30)
    values[[0, 7, 8, 9, 29]] = np.nan
    around = [[v for v in values[max(i - window // 2, 0) : i + window // 2 + 1] if v == v] for i in range(30)]
    np.testing.assert_allclose(drawing.running_mean(values, window), [np.mean(a) if a else np.nan for a in around])


def test_a_long_run_is_a_light_page_with_its_peaks():
    """The extremes stand where a curve of nothing else has them."""
    def drawn(x, y):
        svg = drawing.lines(drawing.Panel("", [drawing.Curve("", x, y)]))
        longest = max(re.findall('<path d="([^"z]*)"', svg), key=len)
        return svg, np.array(re.findall(r"[ML] (\S+) (\S+)", longest), dtype=float)
    x = np.arange(100_000.0)
    y = np.random.default_rng(0).normal(size=100_000)
    y[77_777], y[5] = 50.0, np.nan
    few = [0, 77_777, np.nanargmin(y), 99_999]
    (svg, points), (_, expected) = drawn(x, y), drawn(x[few], y[few])
    assert len(svg) < 100_000
    for extreme in (np.argmin, np.argmax):
        np.testing.assert_allclose(points[extreme(points[:, 1])], expected[extreme(expected[:, 1])], atol=0.5)


def test_a_figure_as_a_file_is_a_whole_svg(write_run, tmp_path):
    """benchmarks/figures.py draws them for the documents."""
    import xml.etree.ElementTree as ElementTree
    script = Path(__file__).parents[1] / "benchmarks" / "figures.py"
    subprocess.run([sys.executable, script, write_run("a < b & c"), "--out", tmp_path], check=True,
                   env={**os.environ, "PYTHONPATH": str(script.parents[1])}, stdout=subprocess.DEVNULL)
    root = ElementTree.parse(tmp_path / "a < b & c-loss.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert all(f"{variable}:" in style for variable in ("--page", "--ink", "--c1"))
