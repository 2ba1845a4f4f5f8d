"""A run that died goes on as if it had not: the same losses and the same weights, bit for bit."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from oracles.tiny_llama import write_tiny_llama
from safetensors.torch import load_file
from small_runs import HERE, assert_same, final_weights, log, options, train, wait_for_savers

from minisft.data.dataset import Dataset
from minisft.model import weights
from minisft.runs import lifecycle
from minisft.runs.lifecycle import main
from minisft.training import loop

SMALL = {"train__max_steps": 7, "batch__packs": 4, "checkpoint__every": 2}  # 3 steps an epoch


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(base, folder, **SMALL), final_weights(folder)


class Death(BaseException):
    """Not an Exception: nothing in the program gets to tidy up after it."""


def run_until_death(monkeypatch, argv, *, step, micro_batches=4):
    """Start a run and let it die in the middle of `step` (from 1)."""
    calls, forward = 0, loop.batch_loss

    def dying(*args, **options):
        nonlocal calls
        calls += 1
        if calls > (step - 1) * micro_batches + 1:
            raise Death
        return forward(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_loss", dying)
        with pytest.raises(Death) as death:  # which keeps the loop's variables
            main(argv)
        assert death
        wait_for_savers()
        assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("step", [2, 4, 6])  # before the first checkpoint; after an epoch's boundary; in its middle
def test_the_log_and_the_weights_are_those_of_an_uninterrupted_run(base, tmp_path, uninterrupted, monkeypatch, step):
    # 11 packs: steps of 4, 4 and 3 micro-batches
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=step)
    train(base, tmp_path, **SMALL)
    assert_same(tmp_path, uninterrupted)


def test_accumulation_and_evaluation_do_not_disturb_it(base, tmp_path, uninterrupted, monkeypatch):
    settings = {**SMALL, "batch__micro_packs": 3, "eval__every": 2, "data__eval": HERE / "oracles/conversations.jsonl"}
    whole = train(base, tmp_path / "whole", **settings), final_weights(tmp_path / "whole")
    run_until_death(monkeypatch, options(base, tmp_path / "died", **settings), step=5, micro_batches=2)
    train(base, tmp_path / "died", **settings)
    assert_same(tmp_path / "died", whole)
    evals = [[{**record, "seconds": None} for record in log(folder, "eval")]
             for folder in (tmp_path / "died", tmp_path / "whole")]
    assert evals[0] == evals[1]


@pytest.mark.parametrize(("change", "named"), [
    ({"data__seq_len": 300}, "data.seq_len: was 512, is 300"), ({"train__seed": 3}, "train.seed: was 0, is 3"),
    ({"batch__packs": 5}, "batch.packs: was 4, is 5"), ({"data__train_on": "all"}, "data.train_on: was 'assistant'"),
])
def test_changed_settings_are_refused(base, tmp_path, monkeypatch, capsys, change, named):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    assert main(options(base, tmp_path, **{**SMALL, **change})) == 2
    printed = capsys.readouterr().err
    assert named in printed
    config = (tmp_path / "run/config.toml").read_text()  # of the run, not of the start that was refused
    assert not any(f"{name.partition('__')[2]} = {value}\n" in config for name, value in change.items())
    assert "--checkpoint.allow_change" in printed
    assert main(options(base, tmp_path, **{**SMALL, **change}, checkpoint__allow_change="true")) == 0


@pytest.mark.parametrize(("change", "named"), [
    ("base", "base: was '"), ("path", "base: was '"), ("random", "', is 'random'"),
    ("eval", "held-out held: was ['")])
def test_another_base_and_another_held_out_file_are_refused(base, tmp_path, capsys, change, named):
    held, other = tmp_path / "held.jsonl", tmp_path / "other"
    shutil.copy(HERE / "oracles/conversations.jsonl", held)
    settings = {"train__max_steps": 1, "batch__packs": 1, "data__eval": held}
    mine = shutil.copytree(base, tmp_path / "base")
    write_tiny_llama(other, seed=1)
    train(mine, tmp_path, **settings)
    if change in ("base", "path"):
        shutil.copy(other / "model.safetensors", mine) if change == "base" else settings.update(model__path=other)
    elif change == "random":
        settings |= {"model__init": "random", "model__config": base / "config.json", "model__path": "",
                     "model__tokenizer": base}
    elif change == "eval":
        held.write_text("".join(held.read_text().splitlines(keepends=True)[:9]))
    assert main(options(mine, tmp_path, **settings | {"train__max_steps": 2})) == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert "pass --checkpoint.allow_change true" in printed


def test_a_start_that_fails_early_is_no_preempted_run(base, tmp_path, monkeypatch, capfd):
    """Or a script that starts preempted runs again would do so for ever."""
    monkeypatch.setattr(weights, "load", lambda *args, load=weights.load: os.kill(os.getpid(), 15) or load(*args))
    assert main(options(base, tmp_path, **SMALL)) == 75
    assert main(options(base, tmp_path, **SMALL, data__eval=tmp_path / "gone.json")) == 2
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "gone.json" in status["error"]
    assert capfd.readouterr().err.count("gone.json") == 1


def test_fewer_steps_than_were_taken_are_refused(base, tmp_path, monkeypatch, capsys):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=6)
    assert main(options(base, tmp_path, **{**SMALL, "train__max_steps": 3})) == 2
    assert "step-000004: is of step 4, but the run has only 3 steps now; raise train.epochs" in capsys.readouterr().err
    train(base, tmp_path, **{**SMALL, "train__max_steps": 4})
    assert (tmp_path / "run/final/config.json").exists()


def test_asked_to_stop_in_the_last_step_it_saves_before_it_exports(base, tmp_path, monkeypatch):
    calls, forward = [], loop.batch_loss

    def asked(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **options)

    monkeypatch.setattr(loop, "batch_loss", asked)
    found = []
    monkeypatch.setattr(lifecycle, "export_as", lambda *args, **kwargs: found.append(
        (saved(tmp_path / "run"), json.loads((tmp_path / "run/status.json").read_text())["state"])))
    assert main(options(base, tmp_path, **{**SMALL, "train__max_steps": 1, "checkpoint__every": 0})) == 0
    assert found == [(["step-000001"], "preempted")]  # killed from here on, a scheduler starts it again
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"


def saved(run):
    return sorted(path.name for path in run.glob("checkpoints/*"))


def test_going_back_by_hand_replaces_what_came_after(base, tmp_path, monkeypatch, capsys):
    """A future that was given up is neither kept for its number nor gone on from."""
    run, settings = tmp_path / "run", {**SMALL, "train__max_steps": 9, "checkpoint__keep": 2}
    run_until_death(monkeypatch, options(base, tmp_path, **settings), step=7)
    assert saved(run) == ["step-000004", "step-000006"]
    back = {"checkpoint__resume": run / "checkpoints/step-000004", "checkpoint__every": 5, "optim__lr": 1e-5}
    run_until_death(monkeypatch, options(base, tmp_path, **{**settings, **back}), step=1)  # dies in step 5
    assert "step-000004, after step 4; the next checkpoint replaces step-000006\n" in capsys.readouterr().out
    assert saved(run) == ["step-000004", "step-000006.given-up"]
    run_until_death(monkeypatch, options(base, tmp_path, **{**settings, "optim__lr": 1e-5, "checkpoint__every": 5}),
                    step=2)  # of itself it goes on from where it went back to
    assert "step-000004, after step 4\n" in capsys.readouterr().out
    assert saved(run) == ["step-000004", "step-000005"]
    train(base, tmp_path, **settings)
    assert [record["step"] for record in log(tmp_path)] == list(range(1, 10))


def test_the_command_that_goes_back_goes_on_when_it_is_started_again(base, tmp_path, monkeypatch, capsys):
    """As a scheduler does: a run that went back again at every start would never end."""
    run, settings = tmp_path / "run", {**SMALL, "train__max_steps": 11, "checkpoint__keep": 1}
    run_until_death(monkeypatch, options(base, tmp_path, **settings), step=5)
    back = options(base, tmp_path, **settings, checkpoint__resume=run / "checkpoints/step-000004", optim__lr=1e-5)
    for died_in, goes_on in ((5, 4), (7, 4), (9, 6), (10, 8)):
        run_until_death(monkeypatch, back, step=died_in - goes_on)
        assert f"resuming from {run}/checkpoints/step-{goes_on:06}, after step {goes_on}\n" in capsys.readouterr().out
    assert main(back) == 0
    assert [record["step"] for record in log(tmp_path)] == list(range(1, 12))


def test_going_back_to_another_runs_checkpoint_gives_up_ones_own(base, tmp_path, monkeypatch):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=3)
    run_until_death(monkeypatch, options(base, tmp_path / "other", **SMALL), step=5)
    back = options(base, tmp_path, **SMALL, checkpoint__resume=tmp_path / "other/run/checkpoints/step-000004")
    run_until_death(monkeypatch, back, step=1)
    assert saved(tmp_path / "run") == ["step-000002.given-up"]
    run_until_death(monkeypatch, back, step=3)
    assert saved(tmp_path / "run") == ["step-000006"]


def test_nothing_foreign_is_overwritten(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("precious")
    assert main(options(base, tmp_path, **SMALL)) == 2
    assert "holds config.toml, but no run" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.toml").read_text() == "precious"
    (tmp_path / "run" / "config.toml").unlink()
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    assert main(options(base, tmp_path, **SMALL, checkpoint__resume="never")) == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert 'holds checkpoints, and checkpoint.resume is "never"' in capsys.readouterr().err


def plant_nan(monkeypatch, steps, micro_batches=4):
    """Make the loss of the first micro-batch of these steps (from 1) not a number."""
    calls, forward = 0, loop.batch_loss

    def poisoned(*args, **options):
        nonlocal calls
        calls += 1
        loss = forward(*args, **options)
        return loss * float("nan") if (calls - 1) // micro_batches + 1 in steps else loss

    monkeypatch.setattr(loop, "batch_loss", poisoned)


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


def test_an_unwritable_run_folder_is_an_input_output_error(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(options(base, tmp_path, run__dir=tmp_path / "file" / "run")) == 4
    assert "file/run" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_log(base, tmp_path, uninterrupted):
    records, weights = uninterrupted
    again = train(base, tmp_path, **SMALL)
    timing = {"seconds", "tokens_per_second", "memory_gib"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in again] == \
           [{k: v for k, v in r.items() if k not in timing} for r in records]
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(tmp_path).items())


def test_going_on_late_reads_no_more_than_beginning(base, tmp_path, monkeypatch):
    """The first documents that are read after a resume are those of its first step: nothing is replayed or skipped."""
    fetched, first = [], {}
    document = Dataset.document
    monkeypatch.setattr(Dataset, "document", lambda self, i: fetched.append(i) or document(self, i))
    steps = loop.steps

    def counted(dataset, plan, **options):
        for step in steps(dataset, plan, **options):
            needed = [int(i) for pack in plan.documents(step.index) for i in pack]
            first.setdefault(options["start"], (sorted(fetched[: len(needed)]), sorted(needed)))
            yield step

    monkeypatch.setattr(loop, "steps", counted)
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=7)
    fetched.clear()
    assert main(options(base, tmp_path, **SMALL)) == 0
    assert set(first) == {0, 6}
    assert all(read == needed for read, needed in first.values())


def test_models_along_the_way(base, tmp_path, monkeypatch):
    """checkpoint.export_every: each is the model of its step, also where the step was taken twice."""
    settings = {**SMALL, "checkpoint__export_every": 3}
    run_until_death(monkeypatch, options(base, tmp_path, **settings), step=4)
    train(base, tmp_path, **settings)
    assert sorted(path.name for path in (tmp_path / "run/exports").iterdir()) == ["step-000003", "step-000006"]
    train(base, tmp_path / "short", **{**SMALL, "train__max_steps": 3})
    along = load_file(tmp_path / "run/exports/step-000003/model.safetensors")
    assert all(torch.equal(weight, along[name]) for name, weight in final_weights(tmp_path / "short").items())


def test_a_damaged_document_ends_the_run_and_the_same_command_resumes(base, tmp_path, monkeypatch, uninterrupted,
                                                                      capsys):
    """Opening looks at two documents; the damaged one is found by the step that would have trained on it."""
    monkeypatch.setattr("minisft.data.store.SAMPLE", 2)
    assert main(options(base, tmp_path, **{**SMALL, "train__max_steps": 2, "run__dir": tmp_path / "short"})) == 0
    (masks,) = tmp_path.glob("cache/*/trained.bin")
    last = np.load(masks.with_name("offsets.npy"))[16:18]  # of a document that the last step of an epoch has
    whole = bytearray(masks.read_bytes())
    whole[int(last[1]) - 1] ^= 1
    masks.write_bytes(whole)
    capsys.readouterr()
    assert main(options(base, tmp_path, **SMALL)) == 4
    assert f"error: {masks.parent}: damaged (document 17 of 32 is not as it was written)" in capsys.readouterr().err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    train(base, tmp_path, **SMALL)
    assert_same(tmp_path, uninterrupted)


def test_a_failed_run_says_how_far_it_came(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        plant_nan(patch, {3, 4})
        assert main(options(base, tmp_path, **SMALL, train__max_skipped=1)) == 3
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 3, 4)
    assert "2 steps in a row" in status["error"]


def test_interrupted_before_the_first_step(base, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # another thread may be the one that is told; this one hears of it a little later
            time.sleep(0.01)

    monkeypatch.setattr(lifecycle, "prepare", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        assert main(options(base, tmp_path, **SMALL)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted before the first step; there is nothing to save" in capsys.readouterr().err


def test_asked_to_stop_while_the_model_is_read(base, tmp_path, monkeypatch):
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or load(*args))
    assert main(options(base, tmp_path, **SMALL)) == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert 0 < status["step"] < 3
    assert (tmp_path / f"run/checkpoints/step-00000{status['step']}/manifest.json").exists()


def test_only_ctrl_c_ends_a_run_that_is_stopping(monkeypatch, capfd):
    """SLURM signals the ranks and torchrun, which passes the signal on to ranks that have had it."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    preemption = lifecycle.Preemption()
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert preemption.requested
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        preemption.close()
    assert ended == [128 + signal.SIGINT]
    assert "SIGINT: stopping at once" in capfd.readouterr().err


def test_what_is_said_of_ctrl_c_holds_when_it_is_said(monkeypatch):
    """Whoever reads the line may press Ctrl-C before the handler that printed it has returned."""
    known = []

    class Printed:
        def __init__(self, **_):
            pass

        def start(self):
            known.append(preemption.requested)

    monkeypatch.setattr(sys.modules[lifecycle.Preemption.__module__], "Thread", Printed)
    preemption = lifecycle.Preemption()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        preemption.close()
    assert known == [True]


@pytest.mark.parametrize(("wanted", "told"), [
    ("auto", "the same command resumes"), ("never", "the same command, without checkpoint.resume = never, resumes")])
def test_a_stopped_run_says_what_resumes_it(base, tmp_path, monkeypatch, capsys, wanted, told):
    monkeypatch.setattr(weights, "load", lambda *args, load=weights.load: os.kill(os.getpid(), 15) or load(*args))
    assert main(options(base, tmp_path, batch__packs=1, checkpoint__resume=wanted)) == 75
    assert f"; {told} from there\n" in capsys.readouterr().out


@pytest.mark.parametrize("options_", ["ro", "size=4k", "size=600k"])
def test_a_folder_that_cannot_hold_the_run_is_found_before_the_model_is_read(base, tmp_path, monkeypatch, capsys,
                                                                             options_):
    disk = tmp_path / "run"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o {options_} tmpfs {disk} 2>/dev/null"):
        pytest.skip("no small file system can be mounted here")
    monkeypatch.setattr(weights, "load", lambda *args: pytest.fail("the model was read"))
    try:
        assert main(options(base, tmp_path, **SMALL)) == 4
        assert str(disk) in capsys.readouterr().err
    finally:
        os.system(f"umount {disk}")


def test_too_little_memory_on_a_gpu_ends_with_what_helps(base, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(loop, "batch_loss", full)
    assert main(options(base, tmp_path, **SMALL)) == 2
    assert capsys.readouterr().err.endswith(
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. To need less: "
        "parallel.activation_checkpointing = full, "
        "a lower batch.micro_packs or data.seq_len, or see docs/memory.md\n")
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 2


def test_more_processes_than_gpus_are_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert main(options(base, tmp_path, **SMALL)) == 2
    assert "3 processes on a host with 2 GPUs; start one for each (torchrun --nproc-per-node 2)" in \
        capsys.readouterr().err


def test_the_room_asked_for_is_what_a_run_takes_at_most(base, tmp_path, monkeypatch, capsys):
    parameters = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    most = 4 * parameters * (3 * 3 + 1)  # keep = 2: three checkpoints of weights and two moments; the model in fp32
    settings = {**SMALL, "checkpoint__every": 1, "checkpoint__keep": 2}
    usage = shutil.disk_usage(tmp_path)
    free = most - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    assert main(options(base, tmp_path, **settings)) == 4
    assert f"the run needs {most:,} bytes and {free:,} are free" in capsys.readouterr().err
    (tmp_path / "run/checkpoints/step-000004.tmp").mkdir(parents=True)  # a save that was killed will be removed
    (tmp_path / "run/checkpoints/step-000004.tmp/rank-0.safetensors").write_bytes(bytes(1000))
    free = most - 1000
    assert main(options(base, tmp_path, **settings)) == 0


def test_every_step_of_a_checkpoint_is_in_the_log(base, tmp_path, monkeypatch, uninterrupted):
    save = lifecycle.Saver.save

    def dying(saver, step, *args):  # when the checkpoint is there and nothing else has happened since
        save(saver, step, *args)
        saver.finish()
        assert [r["step"] for r in log(tmp_path)] == list(range(1, step + 1))
        if step == 4:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle.Saver, "save", dying)
        with pytest.raises(Death):
            main(options(base, tmp_path, **SMALL))
    train(base, tmp_path, **SMALL)
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize(("line", "wrong"), [
    ("no JSON", "not JSON"), ("[1]", "it is [1], expected an object"), ('{"kind": "train"}', "step is missing"),
    ('{"step": 1}', "kind is missing"), ('{"kind": "x", "step": "1"}', "step is '1', expected a whole number"),
    ('{"kind": "train", "step": 1, "loss": 2.0}', "tokens is missing"),
    ('{"kind": "train", "step": 1, "tokens": 9, "target_tokens": 9, "seconds": NaN}', "not JSON"),
    ('{"kind": "eval", "step": 1, "loss": 2.0, "target_tokens": 3}', "name is missing"),
    ('{"kind": "eval", "step": 1, "name": "a", "loss": "low", "target_tokens": 3}',
     "loss is 'low', expected a number"),
    ("\xff", "not JSON")])
def test_a_broken_line_in_the_log_is_named(base, tmp_path, monkeypatch, capsys, line, wrong):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    file = tmp_path / "run/metrics.jsonl"
    first, *others = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([first, line, *others, '{"kind": "tra']), encoding="latin-1")  # and a last one cut off
    monkeypatch.setattr(weights, "load", lambda *args: pytest.fail("the model was read"))
    assert main(options(base, tmp_path, **SMALL)) == 2
    shown = line.replace("\xff", "\N{REPLACEMENT CHARACTER}")[:80]
    message = f"{file}:2: not a metrics record ({wrong}); fix or delete this line: {shown!r}"
    assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "run/status.json").read_text()) == {
        "state": "failed", "exit_code": 2, "step": 1, "error": message}
