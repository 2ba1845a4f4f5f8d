"""A run as a whole: it fails if nothing was trained, loses nothing when its end fails, says what was changed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from oracles.tiny_llama import CONFIG, write_tiny_llama
from safetensors.torch import load_file, save_file
from small_runs import HERE, final_weights, launch, log, options, train, wait_for_savers, wait_for_step

from minisft.__main__ import main as command
from minisft.evals import heldout
from minisft.pretrained import from_pretrained
from minisft.runs import after, lifecycle, metrics
from minisft.runs.lifecycle import main
from minisft.runs.preemption import Stopped
from minisft.training import checkpoint, loop

SMALL = {"train__max_steps": 7, "batch__packs": 4, "checkpoint__every": 2}
HELD_OUT = {"data__eval": HERE / "oracles/conversations.jsonl"}


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


def record_of(folder):
    return json.loads((folder / "run/final/training.json").read_text())


# ---- numbers -----------------------------------------------------------------------------------------------------


def poisoned(folder, name="model.norm.weight", value=float("nan")):
    """A base model with one number that is not finite."""
    write_tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("settings", "value"), [
    ({}, float("nan")), ({"lora__rank": 2}, float("inf")), ({"lora__rank": 2, "lora__base": "nf4"}, float("nan"))])
def test_a_base_model_that_is_not_finite_is_not_trained(tmp_path, capsys, settings, value):
    name = "model.layers.1.mlp.up_proj.weight"
    base = poisoned(tmp_path / "base", name, value)
    assert main(options(base, tmp_path, **SMALL, **settings)) == 3
    said = capsys.readouterr().err
    assert f"error: {base}/model.safetensors: {name} has numbers that are not finite" in said
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 3)
    assert log(tmp_path) == [] if (tmp_path / "run/metrics.jsonl").exists() else True
    assert not (tmp_path / "run/final").exists()


def test_a_held_out_loss_that_is_not_finite_ends_the_run_before_it_begins(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(after, "heldout_loss", lambda *args, **kwargs: float("nan"))
    assert main(options(base, tmp_path, **SMALL, **HELD_OUT)) == 3
    assert "step 0: the held-out loss on conversations is nan: the base model cannot be trained" in \
        capsys.readouterr().err
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"], status(tmp_path)["step"]) == ("failed", 3, 0)
    assert log(tmp_path) == []


def plant_nan(monkeypatch, steps):
    """Make the loss of these steps (from 1) not a number."""
    rate, forward, current = loop.learning_rate, loop.batch_loss, 0

    def counted(step, *args):
        nonlocal current
        current = step + 1
        return rate(step, *args)

    monkeypatch.setattr(loop, "learning_rate", counted)
    monkeypatch.setattr(loop, "batch_loss", lambda *args, **options: forward(*args, **options) * (
        float("nan") if current in steps else 1))
    monkeypatch.setattr(lifecycle, "batch_loss", lambda *args, **options: forward(*args, **options) * (
        float("nan") if 1 in steps else 1))  # on the documents of the first step, at the end


@pytest.mark.parametrize("settings", [{}, {"optim__in_backward": "true", "optim__clip_norm": 0,
                                           "batch__micro_packs": 4}])
def test_a_run_of_skipped_steps_only_fails(base, tmp_path, monkeypatch, capsys, settings):
    """Also when it is started again, and it finds a checkpoint of its last steps."""
    for _ in range(2):
        with monkeypatch.context() as patch:
            plant_nan(patch, range(100))
            assert main(options(base, tmp_path, **SMALL, **settings)) == 3
        assert "none of the 7 steps had a finite loss and gradient, so nothing was trained" in capsys.readouterr().err
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 3)
    assert not (tmp_path / "run/final").exists()


def test_a_rate_that_destroys_the_model_exports_nothing(base, tmp_path, capsys):
    assert main(options(base, tmp_path, **SMALL, optim__lr=1e18)) == 3
    assert "the last 6 of 7 steps had no finite loss or gradient, and neither has the model" in capsys.readouterr().err
    assert not (tmp_path / "run/final").exists()
    assert main(options(base, tmp_path, **SMALL, optim__lr=1e18)) == 3  # from its checkpoint of step 6
    assert "resuming from" in capsys.readouterr().out
    assert main(options(base, tmp_path / "held", **SMALL, **HELD_OUT, optim__lr=1e18, train__max_skipped=2)) == 3
    assert "3 steps in a row" in capsys.readouterr().err


def test_the_row_of_skipped_steps_is_counted_across_a_restart(base, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        plant_nan(patch, {3, 4})
        train(base, tmp_path, **{**SMALL, "train__max_steps": 4})
    assert record_of(tmp_path)["skipped_steps"] == 2
    assert "4 of 4 steps (2 skipped: not finite)" in (tmp_path / "run/final/README.md").read_text()
    shutil.rmtree(tmp_path / "run/final")
    with monkeypatch.context() as patch:
        plant_nan(patch, {5})
        assert main(options(base, tmp_path, **SMALL, train__max_skipped=2)) == 3
    assert "3 steps in a row had a loss or gradient that is not finite, the last at step 5" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved_over_those_that_are(base, tmp_path, monkeypatch, capsys):
    step = lifecycle.AfterStep.step

    def broken(after, number, **kwargs):
        if number == 5:
            after.run.model.model.norm.weight.data[0] = float("inf")
        return step(after, number, **kwargs)

    monkeypatch.setattr(lifecycle.AfterStep, "step", broken)
    assert main(options(base, tmp_path, **{**SMALL, "checkpoint__keep": 1})) == 3
    assert "weights after step 6 are NaN or infinite: model.norm.weight; lower optim.lr" in capsys.readouterr().err
    wait_for_savers()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004"]


# ---- changes on resume -------------------------------------------------------------------------------------------


def test_a_changed_setting_is_said_and_recorded_by_step(base, tmp_path, capsys):
    train(base, tmp_path, **{**SMALL, "train__max_steps": 3})
    shutil.rmtree(tmp_path / "run/final")
    capsys.readouterr()
    train(base, tmp_path, **{**SMALL, "train__max_steps": 5}, optim__lr=1e-4)
    said = capsys.readouterr().out
    assert "\noptim.lr: was 0.001, is 0.0001 from step 4\ntrain.max_steps: was 3, is 5 from step 4\n" in said
    shutil.rmtree(tmp_path / "run/final")
    train(base, tmp_path, **SMALL, optim__lr=1e-4, optim__weight_decay=0.1, run__profile="false")
    said = capsys.readouterr().out
    assert "optim.lr: was" not in said
    assert "optim.weight_decay: was 0.0, is 0.1 from step 6" in said
    expected = [(4, "optim.lr", 0.001, 0.0001), (4, "train.max_steps", 3, 5), (6, "optim.weight_decay", 0.0, 0.1),
                (6, "train.max_steps", 5, 7)]
    assert [tuple(change.values()) for change in record_of(tmp_path)["history"]] == expected
    manifest = json.loads((tmp_path / "run/checkpoints/step-000007/manifest.json").read_text())["manifest"]
    assert [tuple(change.values()) for change in manifest["progress"]["history"]] == expected
    assert [record["lr"] for record in log(tmp_path)] == [1e-3] * 3 + [1e-4] * 4
    card = (tmp_path / "run/final/README.md").read_text()
    assert "| 4 | optim.lr | `0.001` | `0.0001` |\n" in card
    assert "## Settings changed during training\n\n| from step | key | was | is |" in card


def test_what_was_changed_with_leave_is_recorded_too_and_a_plain_run_has_no_history(base, tmp_path, capsys):
    train(base, tmp_path, **{**SMALL, "train__max_steps": 3})
    assert record_of(tmp_path)["history"] == []
    assert "changed during training" not in (tmp_path / "run/final/README.md").read_text()
    shutil.rmtree(tmp_path / "run/final")
    data = tmp_path / "other.jsonl"
    lines = (HERE / "oracles/conversations.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:20]))
    train(base, tmp_path, **SMALL, data__train=data, checkpoint__allow_change="true")
    changed = {change["key"] for change in record_of(tmp_path)["history"]}
    assert {"data", "data.train", "train.max_steps"} == changed


def test_what_no_step_was_trained_with_labels_no_model(base, tmp_path, capsys):
    """A sweep in one folder, and a model that is moved away between its runs."""
    settings = {**SMALL, "train__max_steps": 2, "run__export": "false"}
    train(base, tmp_path, **settings)
    before = (tmp_path / "run/config.toml").read_text()
    for change in ({"optim__lr": 1e-5}, {"optim__weight_decay": 0.1, "run__export": "true"}):
        assert main(options(base, tmp_path, **settings | change)) == 2
    said = capsys.readouterr().err
    assert (f"{tmp_path / 'run'}: all 2 steps are taken, so nothing would be trained with what has changed; go back "
            "to it, make the run longer, or choose another folder with run.dir:\n  optim.lr: was 0.001") in said
    assert "run.dir:\n  optim.weight_decay: was 0.0, is 0.1\n" in said
    assert (tmp_path / "run/config.toml").read_text() == before
    train(base, tmp_path, **settings | HELD_OUT | {"run__export": "true", "checkpoint__every": 0})
    assert record_of(tmp_path)["steps"] == 2


def test_a_log_shorter_than_the_checkpoint_is_said_and_recorded(base, tmp_path, capsys):
    train(base, tmp_path, **{**SMALL, "train__max_steps": 6})
    shutil.rmtree(tmp_path / "run/final")
    file = tmp_path / "run/metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    train(base, tmp_path, **SMALL)
    assert f"{file}: has 4 of the 6 steps so far; the others are lost from the log" in capsys.readouterr().out
    record = record_of(tmp_path)
    assert (record["steps"], record["logged_steps"], record["total_steps"]) == (7, 5, 7)
    assert "7 of 7 steps (the log of 2 is lost; none of these figures include them)" in \
        (tmp_path / "run/final/README.md").read_text()


def test_the_log_is_durable_when_a_checkpoint_begins(base, tmp_path, monkeypatch):
    events, fsync, begin = [], os.fsync, lifecycle.Saver.save
    monkeypatch.setattr(metrics.os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or
                        fsync(file))
    monkeypatch.setattr(lifecycle.Saver, "save", lambda saver, step, *args: events.append(step) or
                        begin(saver, step, *args))
    train(base, tmp_path, **{**SMALL, "train__max_steps": 4})
    for step in (2, 4):
        assert events[events.index(step) - 1] == str(tmp_path / "run/metrics.jsonl")


@pytest.mark.parametrize(("change", "messages"), [
    ({"num_hidden_layers": 1}, ["it also has model.layers.1.input_layernorm.weight, "]),
    ({"num_hidden_layers": 3}, ["it lacks model.layers.2.input_layernorm.weight, "]),
    ({"intermediate_size": 96}, ["shapes differ: model.layers.0.mlp.down_proj.weight ([64, 160] there, [64, 96] here)",
                                 "gate_proj.weight ([160, 64] there, [96, 64] here)"])])
def test_another_network_is_not_resumed_with_leave_either(base, tmp_path, capsys, change, messages):
    train(base, tmp_path, **{**SMALL, "train__max_steps": 4})
    shutil.rmtree(tmp_path / "run/final")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | change))
    other = {"model__path": "", "model__init": "random", "model__config": config, "model__tokenizer": base}
    assert main(options(base, tmp_path, **SMALL, **other, checkpoint__allow_change="true")) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {tmp_path}/run/checkpoints/step-000004: holds another network: ")
    assert all(message in said for message in messages), said
    assert said.endswith("go back to the network it was saved from, or choose another run.dir")
    assert len(log(tmp_path)) == 4


def test_a_slow_disk_is_waited_for(base, tmp_path, monkeypatch):
    """Two saves, each of which takes longer than parallel.timeout: the clock starts anew while the disk answers."""
    watched, waits, save_file = [], [], checkpoint.save_file
    monkeypatch.setattr(lifecycle, "watch", watched.append)

    def slow(*args):
        before, deadline = len(watched), time.monotonic() + 3
        while (waited := len(watched) < before + 3) and time.monotonic() < deadline:  # two for a step under way
            time.sleep(0.01)
        waits.append(waited)
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    train(base, tmp_path, train__max_steps=2, batch__packs=1, checkpoint__every=1)
    assert waits == [False, False]


# ---- a failing end -----------------------------------------------------------------------------------------------


def test_a_failed_export_loses_nothing_and_is_tried_again_without_training(base, tmp_path, monkeypatch, capsys):
    settings = {**SMALL, "checkpoint__every": 0, **HELD_OUT, "eval__samples": 1}
    export = after.export

    def in_the_way(*args, **kwargs):
        (tmp_path / "run/final.tmp").write_text("in the way")
        export(*args, **kwargs)

    monkeypatch.setattr(after, "export", in_the_way)
    assert main(options(base, tmp_path, **settings)) == 4
    monkeypatch.undo()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/run/final.tmp" in said
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"], status(tmp_path)["step"]) == ("failed", 4, 7)
    assert (tmp_path / "run/checkpoints/step-000007/manifest.json").exists()
    before = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/final.tmp").unlink()
    monkeypatch.setattr(loop, "batch_loss", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(after, "heldout_loss", lambda *args, **kwargs: pytest.fail("evaluated again"))
    assert main(options(base, tmp_path, **settings)) == 0
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert record_of(tmp_path)["steps"] == 7
    assert status(tmp_path)["state"] == "done"
    monkeypatch.undo()
    train(base, tmp_path / "whole", **settings)
    assert all(torch.equal(weight, final_weights(tmp_path)[name])
               for name, weight in final_weights(tmp_path / "whole").items())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_full_when_the_model_is_written(base, tmp_path, monkeypatch, capsys):
    disk = tmp_path / "run"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=6m tmpfs {disk} 2>/dev/null"):
        pytest.skip("no small file system can be mounted here")
    try:
        export_as = lifecycle.export_as

        def filled(*args, **kwargs):
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 40_000))
            export_as(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(lifecycle, "export_as", filled)
            assert main(options(base, tmp_path, **SMALL)) == 4
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{disk}/final.tmp/model.safetensors" in said
        assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 4)
        (disk / "ballast").unlink()
        assert main(options(base, tmp_path, **SMALL)) == 0
        assert len(log(tmp_path)) == 7
    finally:
        os.system(f"umount {disk}")


# ---- asked to stop in an evaluation --------------------------------------------------------------------------------


def stop_in(monkeypatch, step, call):
    """Signal this process at the given call, from 1, of `Preemption.check` in the evaluation of `step`."""
    check, do, calls = lifecycle.Preemption.check, lifecycle.AfterStep.step, []

    def signalled(self, device):
        calls.append(self)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        check(self, device)

    def begin(after, number, **kwargs):
        monkeypatch.setattr(lifecycle.Preemption, "check", signalled if number == step else check)
        return do(after, number, **kwargs)

    monkeypatch.setattr(lifecycle.AfterStep, "step", begin)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"data__general": HERE / "oracles/conversations.jsonl"}])
def test_an_evaluation_is_given_up_and_made_up_for(base, tmp_path, monkeypatch, capsys, settings):
    """Stopped in the third of the 11 batches that an evaluation has, and in the answers, which come after them."""
    settings = {**SMALL, **HELD_OUT, **settings, "eval__every": 2, "eval__samples": 1, "checkpoint__every": 3}
    batches = 11 * (1 + ("data__general" in settings))
    whole = train(base, tmp_path / "whole", **settings), final_weights(tmp_path / "whole")
    argv, run = options(base, tmp_path / "stopped", **settings), tmp_path / "stopped/run"
    for step, call, said in ((0, 3, "stopped before the first step; the same command starts again"),
                             (0, batches + 5, "stopped before the first step; the same command starts again"),
                             (2, 3, "saved step 2; the same command resumes from there"),
                             (6, batches - 1, "saved step 6; the same command resumes from there"),
                             (7, 3, "saved step 7; the same command resumes from there"),
                             (7, 3 if batches == 11 else 12, "saved step 7; the same command resumes from there")):
        with monkeypatch.context() as patch:
            stop_in(patch, step, call)
            capsys.readouterr()
            assert main(argv) == 75
        assert said in capsys.readouterr().out
        assert (status(run.parent)["state"], status(run.parent)["exit_code"]) == ("preempted", 75)
        assert max([0, *(int(path.name[-1]) for path in (run / "checkpoints").iterdir())]) == step
        assert not (run / "final").exists()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_loss", lambda *args: pytest.fail("trained again"))
        assert main(argv) == 0
    records, weights = whole
    assert [r["loss"] for r in log(run.parent)] == [r["loss"] for r in records]
    for kind in ("eval", "sample"):
        assert [{**r, "seconds": 0} for r in log(run.parent, kind)] == \
               [{**r, "seconds": 0} for r in log(tmp_path / "whole", kind)]
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(run.parent).items())


# ---- streams, signals, environment ---------------------------------------------------------------------------------


def run_in_shell(argv, shell, **environment):
    """train.py with `argv` as the shell line says it: {} is the command."""
    line = shell.format(" ".join(f"'{text}'" for text in (sys.executable, str(HERE.parent / "train.py"), *argv)))
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("shell", ["{} 2>&1 | head -1", *(pytest.param(shell, marks=pytest.mark.slow) for shell in (
    "{} >&- 2>&- <&-", "{} >/dev/full 2>/dev/full", "{} 2>&- | true"))])
def test_a_run_outlives_whoever_reads_its_output(base, tmp_path, shell):
    ended = run_in_shell(options(base, tmp_path, **SMALL), shell)
    assert ended.returncode == 0, ended.stderr
    assert status(tmp_path)["state"] == "done"
    assert len(log(tmp_path)) == len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 7


def test_a_failure_whose_message_nobody_reads_keeps_its_code(base, tmp_path):
    ended = run_in_shell(options(base, tmp_path, **SMALL, data__train="nowhere.jsonl"), "{} >/dev/full 2>/dev/full")
    assert ended.returncode == 2


@pytest.mark.slow
def test_text_that_an_encoding_lacks_does_not_end_a_run(base, tmp_path):
    ended = run_in_shell(options(base, tmp_path / "ğ", **{**SMALL, "train__max_steps": 1}), "{}",
                         PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "abc"}, "error: the environment variable RANK is 'abc', expected a whole number; unset RANK"),
    ({"RANK": "0"}, "error: RANK is set, but WORLD_SIZE is not; unset RANK"),
    ({"LOCAL_RANK": "-1"}, "error: the environment variable LOCAL_RANK is '-1', expected a whole number"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
     "error: the environment variable RANK is 2, but there are 2 ranks (WORLD_SIZE)"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
])
def test_environment_variables_of_torchrun_that_are_none(base, tmp_path, monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(options(base, tmp_path, **SMALL)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("timeout", [1e10, 1e300])
def test_a_timeout_that_no_clock_has_is_refused(base, tmp_path, capsys, timeout):
    assert main(options(base, tmp_path, **SMALL, parallel__timeout=timeout)) == 2
    assert "--parallel.timeout: expected float > 0 and <= 10000000" in capsys.readouterr().err


def test_a_configuration_that_is_not_utf8(base, tmp_path):
    train(base, tmp_path, **{**SMALL, "train__max_steps": 2})
    shutil.rmtree(tmp_path / "run/final")
    (tmp_path / "run/config.toml").write_bytes(b"\xff\xfe")
    train(base, tmp_path, **SMALL)
    assert command(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("verb", ["prepare", "eval"])
def test_interrupted_commands_say_one_word(monkeypatch, capsys, verb):
    def interrupted(options, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"minisft.cli.{verb}_command.run", interrupted)
    assert command([verb, "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("shell", "code"), [("{} >&-", 0), ("{} | true", 0), ("{} >/dev/full", 4)])
def test_commands_without_a_reader(base, tmp_path, shell, code):
    argv = ["-m", "minisft", "prepare", *options(base, tmp_path)]
    line = shell.format(" ".join(f"'{text}'" for text in (sys.executable, *argv)))
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=100,
                           cwd=HERE.parent)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert ended.stderr.count("error: ") == (code != 0)


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 2), (signal.SIGHUP, 2), (signal.SIGINT, 1)])
def test_ctrl_c_in_a_long_evaluation_under_torchrun_saves(base, tmp_path, number, ranks):
    """torchrun kills after 30 seconds; the evaluation of step 3 would take a minute and more. Both ranks leave it
    together."""
    texts = tmp_path / "conversations.jsonl"
    texts.write_text((HERE / "oracles/conversations.jsonl").read_text() * 2)
    settings = {**SMALL, "checkpoint__every": 0, "data__eval": texts, "eval__every": 3}
    process = launch(base, tmp_path, ranks=ranks, program=[HERE / "planted.py", "long", ranks - 1, 3], **settings)
    wait_for_step(tmp_path, 3, process)
    time.sleep(2)
    os.kill(process.pid, number)
    asked = time.monotonic()
    printed = process.communicate(timeout=100)[0]
    assert time.monotonic() - asked < 25
    assert "saved step 3; the same command resumes from there" in printed, printed
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("preempted", 75)
    assert [record["step"] for record in log(tmp_path, "eval")] == [0]


@pytest.mark.slow
def test_a_base_that_is_not_finite_under_two_ranks(tmp_path):
    """Each rank holds half of the rows, and the number is in one of them."""
    process = launch(poisoned(tmp_path / "base"), tmp_path, ranks=2, **SMALL)
    printed = process.communicate(timeout=200)[0]
    assert printed.count("model.safetensors: model.norm.weight has numbers that are not finite") == 1, printed
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 3)


@pytest.mark.slow
def test_a_closed_terminal_saves(base, tmp_path):
    """Of a run without torchrun: the terminal's end sends SIGHUP, and nobody reads any more."""
    argv = options(base, tmp_path, **{**SMALL, "train__max_steps": 400})
    process = subprocess.Popen([sys.executable, HERE.parent / "train.py", *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_step(tmp_path, 2, process)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=100) == 75
    assert status(tmp_path)["state"] == "preempted"


def test_nohup_stays_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        preemption = lifecycle.Preemption()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        preemption.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_answers_stop_when_asked(base):
    def check(*_):
        raise Stopped

    with pytest.raises(Stopped):
        heldout.continue_greedily(from_pretrained(base), [[309, 5]], stop_ids={318}, device=torch.device("cpu"),
                          check=check)


@pytest.mark.slow
def test_whatever_becomes_of_the_files_of_a_run_there_is_no_traceback(base, tmp_path, capsys):
    """Bytes changed, files cut, emptied, exchanged for a folder or lost: the run is resumed, or says why not."""
    settings, rng = {**SMALL, **HELD_OUT, "train__max_steps": 4}, random.Random(0)
    train(base, tmp_path / "good", **settings)
    shutil.rmtree(tmp_path / "good/run/final")
    ended = Counter()
    for i in range(120):
        shutil.rmtree(tmp_path / "tried", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "tried")
        files = [path for path in (tmp_path / "tried/run").rglob("*") if path.is_file()]
        file = rng.choice([*files, *[tmp_path / "tried/run/metrics.jsonl"] * 4])
        content = bytearray(file.read_bytes())
        kind = rng.choice(("change", "change", "cut", "empty", "folder", "lost", "number"))
        if kind == "change" and content:
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        if kind == "number" and (numbers := [*re.finditer(rb"\d+", content)]):
            start, stop = rng.choice(numbers).span()
            content[start:stop] = rng.choice((b"1e999", b"-1", b"null", b'"a"', b"[1]", b"9" * 400, b"NaN"))
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind != "lost":
            file.write_bytes(content[: rng.randrange(len(content) + 1) if kind == "cut" else
                             0 if kind == "empty" else None])
        assert command(["report", str(tmp_path / "tried/run"), "--tensorboard", str(tmp_path / "events")]) in (0, 2, 4)
        code = main(options(base, tmp_path / "tried", **{**settings, "train__max_steps": 5}))
        said = capsys.readouterr().err
        assert code in (0, 2, 4), (i, file, kind)
        assert "Traceback" not in said, (i, file, kind)
        assert (code == 0) == (tmp_path / "tried/run/final").exists(), (i, file, kind)
        ended[code] += 1
    assert ended[0] > 30
    assert ended[2] > 10
