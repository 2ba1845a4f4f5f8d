"""The demo in small: a model that has read about a country answers questions about it that it was never shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisft import config_io
from minisft.demo import demo_run, world
from minisft.runs.lifecycle import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen countries, in English; a base model that read about all, tuned on questions about half of them."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "LANGUAGES", {"en": world.LANGUAGES["en"]})
        demo_run.write_world(folder / "world", countries=16, seed=0)
    shape = json.loads((folder / "world/config.json").read_text())
    (folder / "world/config.json").write_text(json.dumps({**shape, "num_hidden_layers": 2}))
    shared = ["--data.cache", str(folder / "cache"), "--data.seq_len", "304"]
    train(config_io.load([
        "demo-base", "--data.train", str(folder / "world/articles.jsonl"), "--train.max_steps", "200",
        "--model.config", str(folder / "world/config.json"), "--model.tokenizer", str(folder / "world"),
        "--run.dir", str(folder / "base"), *shared]))
    train(config_io.load([
        "demo", "--model.path", str(folder / "base/final"), "--data.train", str(folder / "world/questions.jsonl"),
        "--data.eval", "", "--data.general", str(folder / "world/heldout-articles.jsonl"), "--eval.samples", "0",
        "--train.max_steps", "60",
        "--run.dir", str(folder / "tuned"), *shared]))
    return folder


def test_the_tuned_model_answers_what_it_only_read(folder):
    """94% when this was written; it varies with every change of a rounding. It is 0% if the loss is on the wrong tokens
    or the base has learnt nothing."""
    rows = [json.loads(line) for line in (folder / "world/heldout-questions.jsonl").read_text().splitlines()]
    asked = (folder / "world/questions.jsonl").read_text()
    assert len(rows) == 8 * 4
    assert not [row for row in rows if row["completion"] in asked]
    _, base_score = demo_run.answers(folder / "base/final", rows)
    _, score = demo_run.answers(folder / "tuned/final", rows)
    assert base_score == 0
    assert score >= 0.5


def test_what_was_known_is_partly_forgotten(folder):
    """The loss on plain text rises while the model learns to answer: the price that the demo prints."""
    lines = (folder / "tuned/metrics.jsonl").read_text().splitlines()
    forgotten = [record["forgetting"] for record in map(json.loads, lines) if record["kind"] == "eval"]
    assert forgotten[0] == 0 < forgotten[-1]


def test_a_demo_without_a_model_to_ask_is_refused_before_it_trains(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo_run.main(["--run.export", "false"]) == 2
    assert "run.export = false: the demo ends with questions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("recipe", "given", "read"), [
    ("demo", {}, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}),
    *(pytest.param(*given, marks=pytest.mark.slow) for given in (
        ("llama3-8b", {}, {"GOMP_SPINCOUNT": "10000"}),
        ("demo", {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "77"}, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "77"}),
        ("demo", {"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}))),
])
def test_threads_do_not_spin_away_the_time_of_other_processes(recipe, given, read):
    """OpenMP itself reports what it read when torch was loaded; what the user has set wins."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "train.py", recipe, "--optim.lr", "x"], cwd=root, capture_output=True,
                          text=True, env={**environment, **given, "OMP_DISPLAY_ENV": "verbose"})
    assert done.returncode == 2, done.stderr
    assert "optim.lr" in done.stderr
    for name, value in read.items():
        assert f" {name} = '{value}'\n" in done.stderr
