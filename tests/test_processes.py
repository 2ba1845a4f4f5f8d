"""Processes that are asked to stop, die, hang or fail: what the others do, and what is left."""

import json
import os
import shutil
import signal
import threading

import pytest
import torch
from small_runs import HERE, assert_same, final_weights, launch, log, train, wait_for_step, workers

pytestmark = pytest.mark.slow

SMALL = {"train__max_steps": 7, "batch__packs": 4, "checkpoint__every": 2}
LONG = {**SMALL, "train__max_steps": 400, "checkpoint__every": 1000}
PLANTED = HERE / "planted.py"


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


@pytest.mark.parametrize(("target", "number"), [
    ("rank 0", signal.SIGUSR1), ("rank 1", signal.SIGTERM), ("rank 1", signal.SIGINT),
    ("torchrun", signal.SIGTERM), ("torchrun", signal.SIGINT), ("all", signal.SIGTERM),
])
def test_asked_to_stop_all_ranks_save_after_the_same_step(base, tmp_path, target, number):
    process = launch(base, tmp_path, ranks=2, **LONG)
    wait_for_step(tmp_path, 2, process)
    ranks = workers(process)
    for pid in {"torchrun": [process.pid], "all": [*ranks.values(), process.pid]}.get(target) or [
            ranks[int(target[-1])]]:
        os.kill(pid, number)
    printed = process.communicate(timeout=200)[0]
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("preempted", 75), printed
    done = status(tmp_path)["step"]
    assert (tmp_path / f"run/checkpoints/step-{done:06}/manifest.json").exists()
    assert log(tmp_path)[-1]["step"] == done
    train(base, tmp_path, **{**LONG, "train__max_steps": done + 2})
    assert [r["step"] for r in log(tmp_path)] == list(range(1, done + 3))


def test_no_rank_leaves_before_the_leading_one_has_saved(base, tmp_path):
    """torchrun takes the code of a rank that has stopped for a failure, and sends the others a second signal."""
    process = launch(base, tmp_path, ranks=2, program=[PLANTED, "slow", 0, 1], **LONG)
    wait_for_step(tmp_path, 2, process)
    os.kill(workers(process)[0], signal.SIGUSR1)
    printed = process.communicate(timeout=200)[0]
    assert "stopping at once" not in printed
    assert status(tmp_path)["state"] == "preempted", printed
    assert (tmp_path / f"run/checkpoints/step-{status(tmp_path)['step']:06}/manifest.json").exists()


def test_ctrl_c_ends_one_that_is_stopping(base, tmp_path):
    process = launch(base, tmp_path, program=[PLANTED, "hang", 0, 3], **LONG)
    wait_for_step(tmp_path, 1, process)
    rank = workers(process)[0]  # hangs in step 3, or will
    os.kill(rank, signal.SIGTERM)
    late = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))  # the rank hangs: it never ends by itself
    late.start()
    assert any("stopping soon" in line for line in process.stdout)
    late.cancel()
    os.kill(rank, signal.SIGINT)
    printed = process.communicate(timeout=200)[0]
    assert "SIGINT: stopping at once" in printed
    assert f"exitcode  : {128 + signal.SIGINT}" in printed
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_is_the_same(base, tmp_path):
    settings = {**SMALL, "train__max_steps": 40, "checkpoint__every": 4}
    whole = train(base, tmp_path / "whole", ranks=2, **settings), final_weights(tmp_path / "whole")
    process = launch(base, tmp_path / "killed", ranks=2, extra=["--max-restarts", "2"], program=[PLANTED, "die", 1, 10],
                     **settings)  # the save of step 8 waited for that of step 4
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    assert "resuming from" in printed
    assert_same(tmp_path / "killed", whole)


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


def test_a_folder_has_one_run_at_a_time(base, tmp_path):
    process = launch(base, tmp_path, program=[PLANTED, "hang", 0, 3], **LONG)
    try:
        wait_for_step(tmp_path, 1, process)
        second = launch(base, tmp_path, **LONG)
        printed = second.communicate(timeout=200)[0]
        assert second.returncode != 0
        assert f"{tmp_path / 'run'}: in use by process" in printed
        assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "running"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_hanging_rank_ends_the_job_with_the_stacks(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, program=[PLANTED, "hang", 1, 3], parallel__timeout=15,
                     extra=["--log-dir", tmp_path / "ranks", "--redirects", "3"], **LONG)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    stacks = [file.read_text() for file in sorted((tmp_path / "ranks").glob("*/attempt_0/*/stderr.log"))]
    assert len(stacks) == 2, printed
    assert "Timeout (0:00:15)!" in stacks[1]
    assert "in planted_forward" in stacks[1]  # where it hangs
    if "Timeout (0:00:15)!" in stacks[0]:  # it may hear of the other's end before its own time is up
        assert any(f"in {name}" in stacks[0] for name in ("all_sum", "backward", "forward"))  # where it waits


def test_a_stopped_rank_ends_the_job(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, parallel__timeout=15, **LONG)
    wait_for_step(tmp_path, 2, process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert "Timeout" in printed


def test_a_rank_that_fails_speaks_and_the_others_are_silent(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, program=[PLANTED, "raise", 1, 3], **LONG)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert printed.count("RuntimeError: planted bug") == 1, printed
    assert printed.count("Traceback (most recent call last)") <= 2, printed  # the rank's, and torchrun's own
    assert "Connection" not in printed
    assert status(tmp_path) == {"state": "failed", "exit_code": 1, "step": 2, "error": "planted bug"}


def test_a_leading_rank_that_waits_for_one_that_failed_hears_of_it(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, program=[PLANTED, "deaf", 1, 3], **LONG)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert printed.count("RuntimeError: planted bug") == 1, printed
    assert status(tmp_path) | {"step": 0} == {"state": "failed", "exit_code": 1, "step": 0, "error": "planted bug"}


def test_a_full_disk_under_one_rank(base, tmp_path):
    process = launch(base, tmp_path, ranks=2, program=[PLANTED, "disk", 1, 3], **LONG | {"checkpoint__every": 2})
    printed = process.communicate(timeout=200)[0]
    assert printed.count("error on rank 1: ") == 1, printed
    assert "step-000004.tmp: the checkpoint could not be written ([Errno 28] No space left on device)" in printed
    assert status(tmp_path)["exit_code"] == 4
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    train(base, tmp_path, **SMALL)
    assert [r["step"] for r in log(tmp_path)] == list(range(1, 8))


def test_a_loss_that_is_not_finite_on_one_rank_touches_no_rank(base, tmp_path):
    weights = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        process = launch(base, folder, ranks=2, program=[PLANTED, "nan", rank, 3], **SMALL)
        printed = process.communicate(timeout=200)[0]
        assert process.returncode == 0, printed
        assert [r.get("skipped", False) for r in log(folder)] == [False, False, True, False, False, False, False]
        weights.append(final_weights(folder))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert all(weight.isfinite().all() for weight in weights[0].values())
