"""The best model is kept, and a run ends when more steps do not help: as its log says, and the same after any crash."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    HERE,
    assert_same,
    final_weights,
    launch,
    log,
    options,
    train,
    wait_for_savers,
    wait_for_step,
    workers,
)
from test_resume import Death, run_until_death

from minisft.config import EvalConfig
from minisft.reports.logged_run import read_runs
from minisft.reports.run_report import page
from minisft.runs import after, best, lifecycle
from minisft.runs.lifecycle import main

HELD_OUT = HERE / "oracles/conversations.jsonl"
KEEP = {"data__eval": HELD_OUT, "eval__every": 2, "checkpoint__every": 3, "checkpoint__keep_best": "conversations"}
STOP = {**KEEP, "eval__stop_on": "conversations", "eval__patience": 2}
LOSSES = {0: 5.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 1.5, 12: 1.75}  # the second low comes after the patience


def told(records, name, patience):
    """(best step, last step) by the held-out losses in a log, counted one by one."""
    lowest, at, since = math.inf, None, 0
    for record in records:
        if record["name"] == name:
            loss = math.inf if record["loss"] is None else record["loss"]
            lowest, at, since = (loss, record["step"], 0) if loss < lowest else (lowest, at, since + 1)
            if since == patience:
                return at, record["step"]
    return at, None


@pytest.fixture
def scripted(monkeypatch):
    """The held-out losses are those of LOSSES, whatever the model; {name: {step: loss}} may be put in their place."""
    losses = {"": dict(LOSSES)}

    class Scripted(after.AfterStep):
        def _evaluate(self, step, done):
            names = iter([name for name in self.run.prepared.evals if ("eval", name) not in done])
            with pytest.MonkeyPatch.context() as patch:
                def loss(*args, check, **options):
                    check(0, 1)
                    return losses.get(next(names), losses[""])[step]
                patch.setattr(after, "heldout_loss", loss)
                super()._evaluate(step, done)

    monkeypatch.setattr(lifecycle, "AfterStep", Scripted)
    return losses


def models(folder, kind="best"):
    return sorted(path.name for path in (folder / "run" / kind).glob("*"))


def weights_of(folder, step):
    return load_file(folder / f"run/best/step-{step:06}/model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def of_step(base, tmp_path_factory):
    """The model after some steps, by a run that has no more."""
    def trained(step):
        if step not in known:
            folder = tmp_path_factory.mktemp(f"steps{step}")
            train(base, folder, train__max_steps=step)
            known[step] = final_weights(folder)
        return known[step]

    known = {}
    return trained


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_decisions_are_those_of_a_count(patience):
    random = np.random.default_rng(patience)
    for _ in range(200):
        losses = [None if value == 9 else value / 4 for value in random.integers(0, 10, 12).tolist()]
        records = [{"kind": "eval", "step": 5 * i, "name": name, "loss": loss if name == "a" else i}
                   for i, loss in enumerate(losses) for name in "ab"]
        config = EvalConfig(stop_on=("a",), patience=patience)
        ends = (step for step in range(0, 60, 5)
                if best.stop_reason([record for record in records if record["step"] <= step], config))
        at, end = told(records, "a", patience)
        assert next(ends, None) == end
        until = [record for record in records if end is None or record["step"] <= end]
        assert (best.lowest(until, "a") or {"step": None})["step"] == at
        assert best.lowest(records, "b")["step"] == 0


def test_the_model_of_the_lowest_loss_is_kept(base, tmp_path, scripted, of_step, capsys):
    scripted[""][9] = 2.75
    train(base, tmp_path, **KEEP, train__max_steps=9)
    assert models(tmp_path) == ["step-000004"]
    assert equal(weights_of(tmp_path, 4), of_step(4))
    assert not equal(final_weights(tmp_path), of_step(4))
    record = json.loads((tmp_path / "run/best/step-000004/training.json").read_text())
    assert (record["steps"], record["losses"]["conversations"]["after"]) == (4, 2.0)
    text = capsys.readouterr().out
    assert f"\n{tmp_path}/run/best/step-000004: the lowest loss on conversations, 2.0000\n" in text
    assert "\nsteps    9 of 9\n" in text
    assert "# run-step-000004" in (tmp_path / "run/best/step-000004/README.md").read_text().replace("\\", "")


def test_it_may_be_the_base_model(base, tmp_path, scripted, capsys):
    scripted[""] = dict.fromkeys(range(10), 7.0) | {0: 6.0}
    train(base, tmp_path, **KEEP, train__max_steps=3)
    assert models(tmp_path) == []
    assert "\nstep 0 (the base model): the lowest loss on conversations, 6.0000\n" in capsys.readouterr().out


def test_of_adapters_too(base, tmp_path, scripted):
    train(base, tmp_path, **KEEP, train__max_steps=6, lora__rank=2)
    assert models(tmp_path) == ["step-000004", "step-000004-adapter"]


def test_the_run_ends_when_more_steps_do_not_help(base, tmp_path, scripted, of_step, capsys):
    train(base, tmp_path, **STOP, train__max_steps=12)
    assert told(log(tmp_path, "eval"), "conversations", 2) == (4, 8)
    assert [record["step"] for record in log(tmp_path)] == list(range(1, 9))
    assert equal(final_weights(tmp_path), of_step(8))
    assert equal(weights_of(tmp_path, 4), of_step(4))
    reason = "the last 2 losses on conversations are not below 2.0000, that after step 4 (eval.patience)"
    assert log(tmp_path, "stop") == [{"kind": "stop", "step": 8, "reason": reason}]
    text = capsys.readouterr().out
    assert f"step 8: the run ends here: {reason}\n" in text
    assert f"steps    8 of 12: {reason}\n" in text
    record = json.loads((tmp_path / "run/final/training.json").read_text())
    assert (record["steps"], record["total_steps"], record["stopped"]) == (8, 12, reason)
    assert f"8 of 12 steps (ended early: `{reason}`)" in (tmp_path / "run/final/README.md").read_text()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 8)
    assert models(tmp_path, "checkpoints") == ["step-000006", "step-000008"]
    assert f"8 of 12: {reason}" in page(read_runs([tmp_path / "run"]))


def test_it_goes_on_if_that_is_changed_and_only_then(base, tmp_path, scripted, of_step, capsys):
    train(base, tmp_path, **STOP, train__max_steps=12)
    for change in ({}, {"train__max_steps": 14}, {"optim__lr": 1}):
        assert main(options(base, tmp_path, **{**STOP, "train__max_steps": 12, **change})) == 2
        assert ("; to train it longer, change what ended it: eval.stop_on (['conversations']), eval.patience (2), "
                "eval.forgetting_bound (0.1)\n") in capsys.readouterr().err
    train(base, tmp_path, **{**STOP, "train__max_steps": 12, "eval__patience": 4})
    assert [record["step"] for record in log(tmp_path)] == list(range(1, 13))
    assert models(tmp_path) == ["step-000010"]
    assert equal(weights_of(tmp_path, 10), of_step(10))
    record = json.loads((tmp_path / "run/final/training.json").read_text())
    assert (record["steps"], "stopped" in record) == (12, False)


def die_in(monkeypatch, place):
    """Die at the evaluation of step 4 or 8: before it, or when it is logged but the model not written, or written but
    the worse ones not deleted; or when the checkpoint of the last step begins, or the final model."""
    step, name = place
    owner = {"save": lifecycle, "finish": lifecycle, "delete_worse": best}.get(name, lifecycle.AfterStep)
    before = getattr(owner, name)

    def dying(*args, **options):
        number = next((value for value in args if type(value) is int), step)
        if number == step and (name != "delete_worse" or args[1][-1]["step"] == step):
            raise Death
        return before(*args, **options)

    monkeypatch.setattr(owner, name, dying)


PLACES = [(4, "_evaluate"), (4, "_export"), (4, "delete_worse"), (8, "_evaluate"), (8, "_choose"), (8, "save"),
          (8, "finish")]


@pytest.mark.parametrize("place", PLACES)
def test_killed_around_an_evaluation_it_resumes_as_if_it_had_not_been(base, tmp_path, scripted, of_step, monkeypatch,
                                                                     place):
    with monkeypatch.context() as patch:
        die_in(patch, place)
        with pytest.raises(Death) as death:  # which keeps the loop's variables
            main(options(base, tmp_path, **STOP, train__max_steps=12))
        assert death
        wait_for_savers()
    train(base, tmp_path, **STOP, train__max_steps=12)
    assert models(tmp_path) == ["step-000004"]
    assert equal(weights_of(tmp_path, 4), of_step(4))
    assert equal(final_weights(tmp_path), of_step(8))
    assert [record["step"] for record in log(tmp_path)] == list(range(1, 9))
    assert {record["step"]: record["loss"] for record in log(tmp_path, "eval")} == {
        step: LOSSES[step] for step in range(0, 9, 2)}
    assert [record["step"] for record in log(tmp_path, "stop")] == [8]


def test_a_run_that_ended_early_is_not_labelled_with_another_rate(base, tmp_path, scripted, capsys):
    settings = {**STOP, "train__max_steps": 12, "run__export": "false"}
    train(base, tmp_path, **settings)
    assert main(options(base, tmp_path, **settings, optim__lr=1e-5)) == 2
    assert "all 8 steps are taken, so nothing would be trained with what has changed" in capsys.readouterr().err
    train(base, tmp_path, **{**settings, "eval__patience": 3}, optim__lr=1e-5)  # now steps follow
    assert [record["lr"] for record in log(tmp_path)] == [1e-3] * 8 + [1e-5] * 4


def test_a_best_model_is_kept_as_long_as_a_checkpoint_would_need_it(base, tmp_path, scripted, of_step, monkeypatch):
    """The run died after a lower loss than that of its checkpoint, and goes on otherwise, never to reach it again."""
    scripted[""] = {0: 5.0, 2: 3.0, 4: 2.0, 6: 4.0, 7: 4.0}
    run_until_death(monkeypatch, options(base, tmp_path, **KEEP, train__max_steps=7), step=6)
    assert models(tmp_path) == ["step-000002", "step-000004"]  # of the checkpoint of step 3, and of the run
    scripted[""][4] = 6.0
    run_until_death(monkeypatch, options(base, tmp_path, **KEEP, train__max_steps=7, optim__lr=0), step=1)
    assert models(tmp_path) == ["step-000002", "step-000004.given-up"]
    train(base, tmp_path, **KEEP, train__max_steps=7, optim__lr=0)
    assert models(tmp_path) == ["step-000002"]
    assert equal(weights_of(tmp_path, 2), of_step(2))


@pytest.mark.parametrize("then", [4, 5])  # models of steps that are not exported again stay no longer
def test_a_model_on_the_way_is_that_of_the_steps_that_were_taken(base, tmp_path, monkeypatch, then):
    """Gone back by hand, and killed after the checkpoint of a step whose older model is there."""
    settings = {"checkpoint__every": 2, "checkpoint__export_every": 4, "train__max_steps": 6}
    run_until_death(monkeypatch, options(base, tmp_path, **settings), step=5)
    old = load_file(tmp_path / "run/exports/step-000004/model.safetensors")
    back = {**settings, "checkpoint__resume": tmp_path / "run/checkpoints/step-000002", "optim__lr": 1e-5}
    with monkeypatch.context() as patch:
        patch.setattr(after.AfterStep, "_export", lambda *args: (_ for _ in ()).throw(Death))
        with pytest.raises(Death) as death:
            main(options(base, tmp_path, **back))
        assert death
        wait_for_savers()
    train(base, tmp_path, **{**back, "checkpoint__resume": "auto", "checkpoint__export_every": then})
    assert models(tmp_path, "exports") == [f"step-00000{then}"]
    assert not equal(load_file(tmp_path / f"run/exports/step-00000{then}/model.safetensors"), old)


def test_a_run_does_not_end_on_a_loss_that_is_not_finite(base, tmp_path, scripted, capsys):
    """Nor when the same command is given again: what was not finite is evaluated once more."""
    for end, settings in ((8, STOP), (12, KEEP)):
        scripted[""] = LOSSES | {end: math.nan}
        for _ in range(2):
            assert main(options(base, tmp_path / str(end), **settings, train__max_steps=12)) == 3
            told = capsys.readouterr().err
            assert f"step {end}: the held-out loss on conversations is nan: nothing is exported" in told
            assert not (tmp_path / str(end) / "run/final").exists()


@pytest.mark.slow
def test_forgetting_ends_it_on_two_ranks_too(base, tmp_path):
    """Real losses: of text whose bytes no conversation has."""
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in ("þðþð", "ƕƕ", "ǣǣþ")))
    train(base, tmp_path, ranks=2, data__general=general, eval__every=2, eval__stop_on="forgetting",
          checkpoint__keep_best="general", eval__forgetting_bound=0.05, train__max_steps=12, optim__lr=5e-3)
    evals = log(tmp_path, "eval")
    over = [record["step"] for record in evals if record["forgetting"] > 0.05]
    assert over == [evals[-1]["step"]] == [log(tmp_path)[-1]["step"]]
    assert over[0] < 12
    lowest = min(evals, key=lambda record: record["loss"])["step"]
    assert models(tmp_path) == [f"step-{lowest:06}"] * (lowest > 0)
    assert "above the base model's (eval.forgetting_bound = 0.05)" in log(tmp_path, "stop")[0]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_two_ranks_killed_choose_as_if_they_had_not_been(base, tmp_path, step):
    """Real losses, held against the log; the model is that of the uninterrupted run, bit for bit."""
    settings = {**KEEP, "checkpoint__every": 2, "eval__every": 1, "train__max_steps": 12, "optim__lr": 0.1,
                "eval__stop_on": "conversations", "eval__patience": 2}
    train(base, tmp_path / "whole", ranks=2, **settings)
    with launch(base, tmp_path / "died", ranks=2, **settings) as torchrun:
        wait_for_step(tmp_path / "died", step, torchrun)
        for pid in workers(torchrun).values():
            os.kill(pid, signal.SIGKILL)
        torchrun.communicate(timeout=90)
    train(base, tmp_path / "died", ranks=2, **settings)
    evals = log(tmp_path / "died", "eval")
    assert [record["loss"] for record in evals] == [record["loss"] for record in log(tmp_path / "whole", "eval")]
    at, end = told(evals, "conversations", 2)
    assert 0 < at < end < 12
    assert models(tmp_path / "died") == models(tmp_path / "whole") == [f"step-{at:06}"]
    assert equal(weights_of(tmp_path / "died", at), weights_of(tmp_path / "whole", at))
    assert_same(tmp_path / "died", (log(tmp_path / "whole"), final_weights(tmp_path / "whole")))


@pytest.mark.parametrize(("change", "message"), [
    ({"checkpoint.keep_best": "else"}, "else: no held-out set has this name; there are: conversations"),
    ({"eval.stop_on": "else,conversations"}, "else: no held-out set has this name; there are: conversations"),
    ({"checkpoint.keep_best": "conversations", "eval.every": 0}, "eval.every: is 0, so no loss before the end tells"),
    ({"eval.stop_on": "conversations", "eval.every": 0}, "eval.every: is 0, so no loss before the end tells"),
    ({"eval.stop_on": "forgetting"}, "forgetting is measured on data.general and ends the run above"),
    ({"eval.patience": 2}, "eval.patience: 2 does nothing unless eval.stop_on names a held-out set; leave it out"),
])
def test_names_are_checked_before_anything_is_read(base, tmp_path, capsys, change, message):
    settings = {"data.eval": HELD_OUT, "eval.every": 2, **change}
    assert main([*options(base, tmp_path), *(text for key, value in settings.items()
                                             for text in (f"--{key}", str(value)))]) == 2
    assert message in capsys.readouterr().err


def test_room_for_the_best_models_is_there(base, tmp_path, monkeypatch, capsys):
    size = 4 * sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    needed = []
    for settings in ({}, {"checkpoint__keep_best": "conversations"}, {"checkpoint__keep_best": "conversations",
                                                                     "checkpoint__keep": 1}):
        assert main(options(base, tmp_path, **{**KEEP, "checkpoint__keep_best": "", "train__max_steps": 12,
                                               **settings})) == 4
        needed.append(int(capsys.readouterr().err.split("the run needs ")[1].split(" ")[0].replace(",", "")))
    assert needed[1] - needed[0] == 4 * size  # two checkpoints' best, the run's, and the one being written
    assert needed[2] == needed[0] - 3 * size + 3 * size
