"""What a run says about itself: spikes, bad steps, a log that cannot be written."""

import json
import re
import time

import pytest
import torch

from minisft.errors import NumericsError
from minisft.runs import metrics
from minisft.runs.metrics import Monitor


def follow(monitor, losses):
    """Take steps of these losses; a gradient norm of NaN where the loss is."""
    for step, loss in enumerate(losses, 1):
        figures = torch.tensor(float(loss))
        monitor.step({"kind": "train", "step": step, "tokens": 10, "lr": 1e-3, "seconds": 0.1, "memory_gib": 0.5},
                     figures, figures * 0 + 1)
    monitor.settle()


def monitor(path, max_skipped=10, **place):
    return Monitor(path, **{"start": 0, "total": 100} | place, max_skipped=max_skipped,
                   documents=lambda step: [f"a.jsonl:{step}"])


WARNING = "the loss has been over twice its running mean of 1.0000 for 5 steps"


@pytest.mark.parametrize(("losses", "warned"), [
    ([1.0] * 10 + [2.1] * 5, "step 15: "), ([1.0] * 10 + [2.1] * 4 + [1.0] + [2.1] * 4, None),
    ([1.0] * 10 + [1.9] * 20, None), ([1.0] * 3 + [9.0] * 30, "step 8: "),
])
def test_a_loss_over_twice_its_mean_for_five_steps_warns_once(tmp_path, capsys, losses, warned):
    follow(monitor(tmp_path / "log"), losses)
    said = capsys.readouterr().out
    assert said.count(WARNING) == (warned is not None)
    assert (warned or "") in said


def test_figures_come_one_step_late_and_none_is_lost(tmp_path):
    follow(monitor(tmp_path / "log"), [3.0, 2.0, 1.0])
    assert [json.loads(line)["loss"] for line in (tmp_path / "log").read_text().splitlines()] == [3.0, 2.0, 1.0]


def test_a_step_on_a_gpu_has_the_time_that_the_gpu_took(tmp_path, monkeypatch):
    """The host is ahead of it: 0.1 ms to start a step of 50 ms, in which an evaluation waits for the last one."""
    class OnGpu(torch.Tensor):
        is_cuda = True

    class Late(metrics.AsyncScalars):
        def read(self):
            time.sleep(max(0, ready - time.perf_counter()))
            return super().read()

    monkeypatch.setattr(metrics, "AsyncScalars", lambda figures: Late(figures.as_subclass(torch.Tensor)))
    following, ready = monitor(tmp_path / "log"), time.perf_counter()
    for step in range(1, 7):
        following.step({"kind": "train", "step": step, "tokens": 10, "lr": 1e-3, "seconds": 1e-4, "memory_gib": 0.5,
                        "tokens_per_second": 10 / 1e-4, "mfu": 500.0}, *torch.ones(2).as_subclass(OnGpu))
        ready = time.perf_counter() + 0.05
        if step % 2 == 0:
            following.settle()  # as an evaluation does,
            time.sleep(0.1)  # which takes long
        following.resume()
    for record in map(json.loads, (tmp_path / "log").read_text().splitlines()):
        assert 0.045 < record["seconds"] < 0.12
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(10)
        assert record["mfu"] * record["seconds"] == pytest.approx(500 * 1e-4)


def test_a_bad_step_is_logged_as_json_with_its_documents(tmp_path, capsys):
    follow(monitor(tmp_path / "log"), [3.0, float("inf"), 1.0])
    record = json.loads((tmp_path / "log").read_text().splitlines()[1], parse_constant=lambda name: 1 / 0)
    assert (record["loss"], record["skipped"], record["documents"]) == (None, True, ["a.jsonl:1"])
    assert "step 2: the loss or the gradient is not finite" in capsys.readouterr().out
    with pytest.raises(NumericsError, match="3 steps in a row"):
        follow(monitor(tmp_path / "other", max_skipped=2), [1.0, *[float("nan")] * 3])


def test_a_full_disk_under_the_log_is_named():
    full = monitor("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        follow(full, [1.0])


@pytest.mark.parametrize(("start", "total"), [(0, 7), (0, 120), (0, 201), (0, 10_000), (7_000, 10_000)])
def test_without_a_terminal_the_first_steps_and_the_last_have_a_line_and_a_long_run_has_a_few_hundred(
        tmp_path, capsys, start, total):
    following = monitor(tmp_path / "log", start=start, total=total)
    for step in range(start + 1, total + 1):
        following.step({"kind": "train", "step": step, "tokens": 10, "lr": 2.5e-5, "seconds": 0.1,
                        "memory_gib": 1.25},
                       torch.tensor(0.5), torch.tensor(3.0))
    following.close()
    told = capsys.readouterr()
    assert (told.err, told.out.count("\r")) == ("", 0)
    lines = re.findall(r"^step +(\d+)/(\d+)  [\d:]+ left  loss 0.5000  lr 2.50e-05  norm 3.00  [\d,]+ tok/s  1.2 GiB  "
                       r"\d+\.\d\d s/step$", told.out, re.MULTILINE)
    steps = [int(step) for step, _ in lines]
    assert steps[:5] == list(range(start + 1, start + 6))
    assert steps[-1] == total
    assert len(steps) == len(told.out.splitlines())
    assert min(total - start, 50) <= len(steps) <= 300


def test_only_the_main_rank_prints(tmp_path, capsys):
    follow(monitor(None), [1.0] * 10 + [9.0] * 5 + [float("nan")])
    assert capsys.readouterr() == ("", "")


def test_records_of_one_kind_are_all_in_the_log_or_none(tmp_path):
    """A resumed run takes the first answer of a step to mean that the others are there too."""
    log = monitor(tmp_path / "log")

    class Counted:
        name, writes = "log", []

        def write(self, text):
            self.writes.append(text)

        def flush(self):
            pass

    log._file = Counted()
    log.write({"kind": "sample", "step": 1, "name": "a"}, {"kind": "sample", "step": 1, "name": "b"})
    assert [len(text.splitlines()) for text in Counted.writes] == [2]
