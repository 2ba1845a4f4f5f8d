"""A run that died goes on as if it had not: the same losses and the same weights, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles.tiny_llama import write_tiny_llama
from small_runs import HERE, final_weights, log, options, train

from minisft.training import trainer
from minisft.training.trainer import main

SMALL = {"train__max_steps": 7, "batch__packs": 4, "checkpoint__every": 2}  # 3 steps an epoch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(base, folder, **SMALL), final_weights(folder)


class Death(BaseException):
    """Not an Exception: nothing in the program gets to tidy up after it."""


def run_until_death(monkeypatch, argv, *, step, micro_batches=4):
    """Start a run and let it die in the middle of `step` (from 1)."""
    calls, forward = 0, trainer.forward

    def dying(*args):
        nonlocal calls
        calls += 1
        if calls > (step - 1) * micro_batches + 1:
            raise Death
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "forward", dying)
        with pytest.raises(Death):
            main(argv)


def same(folder, uninterrupted):
    records, weights = uninterrupted
    assert [(r["step"], r["epoch"], r["loss"], r["grad_norm"], r["lr"]) for r in log(folder)] == \
           [(r["step"], r["epoch"], r["loss"], r["grad_norm"], r["lr"]) for r in records]
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(folder).items())


@pytest.mark.parametrize("step", [2, 4, 6])  # before the first checkpoint; after an epoch's boundary; in its middle
def test_the_log_and_the_weights_are_those_of_an_uninterrupted_run(base, tmp_path, uninterrupted, monkeypatch, step):
    # 11 packs: steps of 4, 4 and 3 micro-batches
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=step)
    train(base, tmp_path, **SMALL)
    same(tmp_path, uninterrupted)


def test_accumulation_and_evaluation_do_not_disturb_it(base, tmp_path, uninterrupted, monkeypatch):
    settings = {**SMALL, "batch__micro_packs": 3, "eval__every": 2, "data__eval": HERE / "oracles/conversations.jsonl"}
    whole = train(base, tmp_path / "whole", **settings), final_weights(tmp_path / "whole")
    run_until_death(monkeypatch, options(base, tmp_path / "died", **settings), step=5, micro_batches=2)
    train(base, tmp_path / "died", **settings)
    same(tmp_path / "died", whole)
    assert log(tmp_path / "died", "eval") == log(tmp_path / "whole", "eval")


def launch(base, folder, *, ranks=1, extra=(), **overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", *extra, str(HERE.parent / "train.py"),
               *options(base, folder, **overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for_step(folder, step, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "run" / "metrics.jsonl").exists() and len(log(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


def workers(process):
    """The ranks of a torchrun, by their number."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        ranks = [entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")]
        if parent == process.pid and ranks:
            found[int(ranks[0])] = int(pid)
    return found


LONG = {**SMALL, "train__max_steps": 400, "checkpoint__every": 1000}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank 1", "torchrun"])
def test_asked_to_stop_all_ranks_save_after_the_same_step(base, tmp_path, target):
    process = launch(base, tmp_path, ranks=2, **LONG)
    wait_for_step(tmp_path, 2, process)
    os.kill(workers(process)[1] if target == "rank 1" else process.pid, signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75), printed
    done = status["step"]
    assert (tmp_path / f"run/checkpoints/step-{done:06}/manifest.json").exists()
    assert log(tmp_path)[-1]["step"] == done
    train(base, tmp_path, **{**LONG, "train__max_steps": done + 2})
    assert [r["step"] for r in log(tmp_path)] == list(range(1, done + 3))


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_is_the_same(base, tmp_path, uninterrupted):
    settings = {**SMALL, "train__max_steps": 40, "checkpoint__every": 4}
    whole = train(base, tmp_path / "whole", ranks=2, **settings), final_weights(tmp_path / "whole")
    process = launch(base, tmp_path / "killed", ranks=2, extra=["--max-restarts", "2"], **settings)
    wait_for_step(tmp_path / "killed", 6, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert "going on from" in printed
    same(tmp_path / "killed", whole)


@pytest.mark.slow
def test_another_number_of_ranks_keeps_the_global_batches(base, tmp_path):
    """2 ranks, then 1, then 3: the same tokens in every step, and losses equal but for rounding."""
    settings = {"batch__packs": 4, "checkpoint__every": 2}
    whole = train(base, tmp_path / "whole", **settings, train__max_steps=8)
    for ranks, stop in ((2, 4), (1, 6), (3, 8)):
        records = train(base, tmp_path / "moved", ranks=ranks, **settings, train__max_steps=stop)
        shutil.rmtree(tmp_path / "moved/run/final")
    for key in ("step", "tokens", "target_tokens", "epoch"):
        assert [r[key] for r in records] == [r[key] for r in whole]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in whole], rel=1e-4)


@pytest.mark.parametrize(("change", "named"), [
    ({"data__seq_len": 300}, "data.seq_len: was 512, is 300"), ({"train__seed": 3}, "train.seed: was 0, is 3"),
    ({"batch__packs": 5}, "batch.packs: was 4, is 5"), ({"data__train_on": "all"}, "data.train_on: was 'assistant'"),
])
def test_changed_settings_are_refused(base, tmp_path, monkeypatch, capsys, change, named):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    assert main(options(base, tmp_path, **{**SMALL, **change})) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert "--checkpoint.allow_change" in printed
    assert main(options(base, tmp_path, **{**SMALL, **change}, checkpoint__allow_change="true")) == 0


@pytest.mark.slow
def test_a_folder_has_one_run_at_a_time(base, tmp_path):
    process = launch(base, tmp_path, **LONG)
    try:
        wait_for_step(tmp_path, 1, process)
        second = launch(base, tmp_path, **LONG)
        printed = second.communicate(timeout=60)[0]
        assert second.returncode != 0
        assert f"{tmp_path / 'run'}: in use by process" in printed
        assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "running"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_nothing_foreign_is_overwritten(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("precious")
    assert main(options(base, tmp_path, **SMALL)) == 2
    assert "holds config.toml, but not of a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.toml").read_text() == "precious"
    (tmp_path / "run" / "config.toml").unlink()
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    assert main(options(base, tmp_path, **SMALL, checkpoint__resume="never")) == 2
    assert 'holds checkpoints, and checkpoint.resume is "never"' in capsys.readouterr().err


def plant_nan(monkeypatch, steps, micro_batches=4):
    """Make the loss of the first micro-batch of these steps (from 1) not a number."""
    calls, forward = 0, trainer.forward

    def poisoned(*args):
        nonlocal calls
        calls += 1
        loss = forward(*args)
        return loss * float("nan") if (calls - 1) // micro_batches + 1 in steps else loss

    monkeypatch.setattr(trainer, "forward", poisoned)


def test_a_step_that_is_not_finite_touches_nothing(base, tmp_path, monkeypatch, capsys):
    settings = {"train__max_steps": 2, "batch__packs": 4}
    train(base, tmp_path / "one", train__max_steps=1, batch__packs=4)
    with monkeypatch.context() as patch:
        plant_nan(patch, {2})
        records = train(base, tmp_path / "two", **settings)
    assert records[1]["skipped"]
    assert records[1]["loss"] is None
    assert all(":" in origin for origin in records[1]["documents"])
    assert "the step is skipped" in capsys.readouterr().out
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_too_many_of_them_in_a_row_end_the_run(base, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        plant_nan(patch, {2, 3, 4, 5, 6, 7})
        assert main(options(base, tmp_path, **SMALL, train__max_skipped=2)) == 3
    assert "3 steps in a row had a loss or gradient that is not finite, the last at step 4" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 3


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job_with_its_stack(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, parallel__timeout=4, **LONG)
    wait_for_step(tmp_path, 2, process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Timeout" in printed
    assert "trainer.py" in printed


def test_an_unwritable_run_folder_is_an_input_output_error(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(options(base, tmp_path, run__dir=tmp_path / "file" / "run")) == 4
    assert "file/run" in capsys.readouterr().err
