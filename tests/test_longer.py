"""A finished run becomes longer on request, and the state of a run's folder is known before its data is prepared."""

import itertools
import json
import shutil

import numpy as np
import pytest
from small_runs import assert_same, final_weights, launch, log, options, train
from test_resume import run_until_death

from minisft.config import OptimConfig
from minisft.data.packing import Plan
from minisft.runs import lifecycle
from minisft.runs.lifecycle import main
from minisft.training import loop
from minisft.training.optimizer import learning_rate

TWO = {"train__max_steps": "none", "train__epochs": 2, "checkpoint__every": 4}  # 3 steps an epoch
THREE = {**TWO, "train__epochs": 3}


def ended(folder):
    """The state of the run, and the steps that the model in final/ has had."""
    state = json.loads((folder / "run/status.json").read_text())["state"]
    return state, json.loads((folder / "run/final/training.json").read_text())["steps"]


@pytest.fixture(scope="module")
def three(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return train(base, folder, **THREE), final_weights(folder)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train(base, folder, **TWO)
    return folder


@pytest.fixture
def finished(two, tmp_path):
    """A finished run of two epochs in `tmp_path`."""
    for name in ("run", "cache"):
        shutil.copytree(two / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("weights", [None, "fractional"])
def test_a_longer_plan_begins_with_the_shorter_one(weights):
    """Documents of a step depend on the data, the seed and the epoch, never on how many epochs follow."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 300, 400)
    weights = random.choice([0.3, 1.0, 2.5], 400) if weights else None
    settings = {"seq_len": 512, "packs_per_step": 7, "seed": 5, "passes": weights}
    short, long = (Plan(lengths, lengths, epochs=epochs, **settings) for epochs in (2, 5))
    capped = Plan(lengths, lengths, epochs=5, max_steps=short.total_steps - 3, **settings)
    assert capped.total_steps < short.total_steps < long.total_steps
    for plan, step in itertools.product((short, capped), range(short.total_steps - 3)):
        assert all(map(np.array_equal, plan.documents(step), long.documents(step)))
    assert all(map(np.array_equal, short.documents(short.total_steps - 1), long.documents(short.total_steps - 1)))


def test_with_another_epoch_it_is_the_run_that_had_it_from_the_start(base, finished, three, monkeypatch, capsys):
    """Bit for bit, with a constant rate; no step is taken twice, and the old model is there until the new one is."""
    during, forward = [], loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *args, **options: during.append(ended(finished)) or
                        forward(*args, **options))
    train(base, finished, **THREE)
    assert during == [("running", 6)] * 11  # the packs of one epoch
    assert ended(finished) == ("done", 9)
    assert_same(finished, three)
    told = capsys.readouterr().out
    assert "checkpoints/step-000006, after step 6\n" in told
    assert "train.epochs: was 2, is 3 from step 7" in told
    record = json.loads((finished / "run/final/training.json").read_text())
    assert record["history"] == [{"from_step": 7, "key": "train.epochs", "was": 2, "is": 3}]


def test_a_run_that_max_steps_ended_goes_on_in_the_middle_of_an_epoch(base, tmp_path, three):
    train(base, tmp_path, **{**THREE, "train__max_steps": 4})
    train(base, tmp_path, **{**THREE, "train__max_steps": 8})
    assert ended(tmp_path) == ("done", 8)
    train(base, tmp_path, **THREE)  # none is more than any number
    assert_same(tmp_path, three)


def test_the_rate_is_that_of_the_new_length(base, tmp_path):
    cosine = {"optim__schedule": "cosine", "optim__warmup_steps": 2}
    train(base, tmp_path, **TWO, **cosine)
    records = train(base, tmp_path, **THREE, **cosine)
    rates = [learning_rate(i, 6 if i < 6 else 9, OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2))
             for i in range(9)]
    assert [record["lr"] for record in records] == rates
    assert rates[5] < rates[6] > rates[7]


def test_killed_on_the_way_the_same_command_resumes(base, finished, three, monkeypatch):
    run_until_death(monkeypatch, options(base, finished, **THREE), step=1)  # before the first new checkpoint
    assert ended(finished)[1] == 6
    run_until_death(monkeypatch, options(base, finished, **THREE), step=3)  # after step 8, which was saved
    assert ended(finished)[1] == 6
    train(base, finished, **THREE)
    assert_same(finished, three)
    assert ended(finished) == ("done", 9)


def test_killed_between_the_model_and_the_status_it_is_finished_by_the_same_command(base, finished, two):
    status = finished / "run/status.json"
    status.write_text(status.read_text().replace('"done"', '"preempted"'))
    train(base, finished, **TWO)
    assert_same(finished, (log(two), final_weights(two)))


def snapshot(folder):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted((folder / "run").rglob("*"))
            if file.is_file() and file.name != ".lock"}


@pytest.fixture
def unprepared(monkeypatch):
    """The data must not be prepared."""
    monkeypatch.setattr(lifecycle, "prepare", lambda *args, **kwargs: pytest.fail("the data was prepared"))


@pytest.mark.parametrize(("change", "message"), [
    ({}, "; to train it longer, raise train.epochs (it had 2) or train.max_steps (none)\n"),
    ({"optim__lr": 1}, "; to train it longer, raise train.epochs (it had 2) or train.max_steps (none)\n"),
    ({"train__max_steps": 2}, "; to train it longer, raise train.epochs (it had 2) or train.max_steps (none)\n"),
    ({"train__epochs": 1}, "; to train it longer, raise train.epochs (it had 2) or train.max_steps (none)\n"),
    ({"checkpoint__allow_change": "true"}, "; to train it longer, raise train.epochs (it had 2)"),
])
def test_a_finished_run_says_how_it_becomes_longer(base, finished, unprepared, capsys, change, message):
    before = snapshot(finished)
    for _ in range(2):
        assert main(options(base, finished, **{**TWO, **change})) == 2
        told = capsys.readouterr().err
        assert f"{finished / 'run'}: holds a finished run; choose another folder with run.dir, or delete it" in told
        assert message in told
    assert snapshot(finished) == before


@pytest.mark.parametrize("damage", ["lost", "empty", "foreign"])
def test_a_finished_run_without_its_checkpoints_or_configuration_stays(base, finished, unprepared, capsys, damage):
    if damage == "lost":
        shutil.rmtree(finished / "run/checkpoints")
    else:
        text = "" if damage == "empty" else "[train]\nepochs = 'x'\nmax_steps = 'none'\n"
        (finished / "run/config.toml").write_text(text)
    assert main(options(base, finished, **THREE)) == 2
    reason = "; it cannot be trained longer, because its checkpoints are gone\n" if damage == "lost" else "\n"
    assert f"holds a finished run; choose another folder with run.dir, or delete it{reason}" in capsys.readouterr().err
    assert ended(finished) == ("done", 6)


def test_a_finished_run_that_exports_and_saves_nothing_is_not_overwritten(base, tmp_path, capsys):
    settings = {"run__export": "false", "checkpoint__every": 0, "train__max_steps": 2, "batch__packs": 1}
    train(base, tmp_path, **settings)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert main(options(base, tmp_path, **settings, optim__lr=1e-5)) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_checkpoint_without_its_manifest_does_not_begin_the_run_again(base, finished, capsys):
    for manifest in finished.glob("run/checkpoints/*/manifest.json"):
        manifest.unlink()
    before = log(finished)
    assert main(options(base, finished, **THREE)) == 2
    assert "holds a finished run, but no complete checkpoint to train it longer from" in capsys.readouterr().err
    assert (log(finished), ended(finished)) == (before, ("done", 6))


def test_more_epochs_that_are_no_more_steps_are_refused_each_time(base, tmp_path, capsys):
    capped = {**TWO, "train__max_steps": 5}
    train(base, tmp_path, **capped)
    before = snapshot(tmp_path)
    for _ in range(2):
        assert main(options(base, tmp_path, **{**capped, "train__epochs": 9})) == 2
        assert ("holds a finished run of 5 steps, and with train.epochs and train.max_steps as they are now it has 5; "
                "raise the one that ends it\n") in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", [{"train__seed": 3}, {"batch__packs": 2}])
def test_a_longer_run_of_other_batches_is_refused_and_the_finished_one_stays(base, finished, capsys, change):
    before = snapshot(finished)
    assert main(options(base, finished, **{**THREE, **change})) == 2
    assert "the run was started with other settings" in capsys.readouterr().err
    assert snapshot(finished) == before


def test_an_unreadable_log_and_foreign_files_are_found_before_the_data_is_prepared(base, finished, unprepared, capsys):
    shutil.rmtree(finished / "run/final")
    with open(finished / "run/metrics.jsonl", "a") as file:
        file.write("garbage\n")
    assert main(options(base, finished, **TWO)) == 2
    assert "metrics.jsonl:7: not a metrics record (not JSON); fix or delete this line" in capsys.readouterr().err
    (finished / "run/status.json").unlink()
    assert main(options(base, finished, **TWO)) == 2
    assert "but no run; choose another folder with run.dir" in capsys.readouterr().err


def test_a_folder_in_use_is_found_before_the_data_is_prepared(base, tmp_path, monkeypatch, capsys):
    """And it is in use from then on: of two that resume it together, one prepares the data."""
    def second(*args, **kwargs):
        monkeypatch.setattr(lifecycle, "prepare", lambda *args, **kwargs: pytest.fail("the data was prepared twice"))
        assert main(options(base, tmp_path, **TWO)) == 2
        assert f"{tmp_path / 'run'}: in use by process" in capsys.readouterr().err
        raise lifecycle.UserError("enough")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(lifecycle, "prepare", second)
    assert main(options(base, tmp_path, **TWO)) == 2
    assert json.loads((tmp_path / "run/status.json").read_text())["error"] == "enough"


@pytest.mark.slow
def test_two_ranks_become_longer_and_are_refused_alike(base, tmp_path):
    train(base, tmp_path / "whole", ranks=2, **THREE)
    train(base, tmp_path / "grown", ranks=2, **TWO)
    again = launch(base, tmp_path / "grown", ranks=2, **TWO)
    printed = again.communicate(timeout=200)[0]
    assert again.returncode == 1
    assert printed.count("holds a finished run") == 1, printed
    process = launch(base, tmp_path / "grown", ranks=2, **{**THREE, "train__epochs": 3})
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    assert_same(tmp_path / "grown", (log(tmp_path / "whole"), final_weights(tmp_path / "whole")))
