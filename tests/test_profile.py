"""The profile of a run: its shares match known work, and it costs nothing unless asked for."""

import gzip
import json
import re
import time

import pytest
import torch
from small_runs import launch, options, train
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from minisft import config_io
from minisft.runs.profile import AROUND, KINDS, OTHER, profiled, table


def shares(text):
    """Kind -> percent, read from the written table."""
    return {kind: float(share) for share, kind in re.findall(r"^ *([\d.]+)%  ([^\d\s].*)$", text, re.MULTILINE)
            if float(share)}


def event(name, start, stop, *, inside=None, thread=1, kernels=(), device_type=DeviceType.CPU):
    made = FunctionEvent(id=0, name=name, thread=thread, start_us=start, end_us=stop, use_device="cuda",
                         device_type=device_type)
    for microseconds in kernels:
        made.append_kernel("kernel", 0, microseconds)
    if inside:
        inside.append_cpu_child(made)
        made.set_cpu_parent(inside)
    return made


def test_known_times_on_a_cpu():
    """A step of 1,000 us: an operation counts without those inside it; other threads do not count."""
    step = event("ProfilerStep#2", 0, 1000)
    loss = event("_LinearCrossEntropy", 100, 400, inside=step)
    reduce = event("FSDP::post_backward_reduce (model.layers.3)", 400, 600, inside=step)
    update = event("Optimizer.step#AdamW.step", 600, 700, inside=step)
    product = event("aten::linear", 700, 800, inside=step)
    events = [step, loss, reduce, update, product, event("loader", 0, 100, inside=step),
              event("aten::mm", 100, 250, inside=loss), event("aten::exp_", 250, 380, inside=loss),
              event("c10d::_reduce_scatter_base_", 400, 470, inside=reduce),
              event("aten::copy_", 470, 500, inside=reduce), event("aten::mul", 600, 640, inside=update),
              event("aten::addmm", 710, 800, inside=product), event("aten::copy_", 800, 850, inside=step),
              event("aten::_scaled_dot_product_flash_attention_for_cpu", 850, 910, inside=step),
              event("aten::silu", 910, 970, inside=step), event("gloo:all_gather", 0, 900, thread=2)]
    assert shares(table(events, 1)) == {
        "matmul": 24, "attention": 6, "communication": 17, "optimizer": 10, "loader": 10, "copies and casts": 5,
        "sharding (FSDP's copies and casts)": 3, "element-wise, norm, rope": 6, "loss, except products": 15,
        "Python, dispatch, waiting": 4}


def test_known_times_on_a_gpu():
    """If kernels ran, their time counts, whichever thread launched them."""
    step = event("ProfilerStep#2", 0, 10_000)
    loss = event("_LinearCrossEntropy", 0, 900, inside=step)
    events = [step, loss, event("aten::mm", 0, 500, inside=loss, kernels=[300, 100]),
              event("aten::exp_", 500, 900, inside=loss, kernels=[50]),
              event("aten::mm", 0, 20, thread=2, kernels=[400]),  # of the backward pass
              event("nccl:_all_gather_base", 0, 10, thread=2, kernels=[150]),
              event("ampere_bf16_s16816gemm", 600, 1000, thread=7, device_type=DeviceType.CUDA)]  # one of those above
    assert shares(table(events, 1)) == {"matmul": 80, "loss, except products": 5, "communication": 15}


def test_work_of_known_cost(tmp_path):
    """A loader that sleeps and a body that multiplies and waits, against the clock around each."""
    seconds, matrix = {"loader": 0.0, "matmul": 0.0, "Python, dispatch, waiting": 0.0}, torch.randn(500, 500)

    def clocked(name, number, work):
        since = time.perf_counter()
        work()
        seconds[name] += (time.perf_counter() - since) * (2 <= number < 5)  # those that are recorded

    def batches():
        for number in range(7):
            with torch.profiler.record_function("loader"):
                clocked("loader", number, lambda: time.sleep(0.03))
            yield number

    seen = []
    for number in profiled(batches(), tmp_path / "profile"):
        seen.append(number)
        clocked("matmul", number, lambda: [torch.mm(matrix, matrix) for _ in range(20)])
        clocked("Python, dispatch, waiting", number, lambda: time.sleep(0.02))
    assert seen == list(range(7))
    found, total = shares((tmp_path / "profile/table.txt").read_text()), sum(seconds.values())
    for name, spent in seconds.items():
        assert found[name] == pytest.approx(100 * spent / total, abs=4)


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_runs_that_end_early(tmp_path, steps):
    """No step is lost; if a step was recorded by then, it is written, and the end is not counted as one more."""
    for number, step in enumerate(profiled(range(steps), tmp_path / "profile")):
        assert number == step
        time.sleep(0.1)
    written = tmp_path / "profile/table.txt"
    assert written.exists() == (steps > 2)
    if written.exists():
        assert float(written.read_text().split()[0]) == pytest.approx(0.1, rel=0.2)


@pytest.mark.slow
def test_files_of_a_run(base, tmp_path):
    """--profile is enough; one of two ranks writes; every step is there once; the shares add up to 100%."""
    with launch(base, tmp_path, ranks=2, train__max_steps=7, run__profile="true") as torchrun:
        printed = torchrun.communicate(timeout=300)[0]
    assert torchrun.returncode == 0, printed
    assert printed.count("trace.json.gz") == 1
    table_of_run = (tmp_path / "run/profile/table.txt").read_text()
    found = shares(table_of_run)
    assert sum(found.values()) == pytest.approx(100, abs=0.05 * len(found) + 1e-6)
    assert re.search(r"% +loader$", table_of_run, re.MULTILINE)  # its share is often less than 0.05%
    assert set(found) | {"loader"} == {kind for kind, _ in KINDS + AROUND} | {OTHER}
    with gzip.open(tmp_path / "run/profile/trace.json.gz") as file:
        names = [entry["name"] for entry in json.load(file)["traceEvents"] if entry.get("cat") == "user_annotation"]
    assert sorted(name for name in names if name.startswith("ProfilerStep")) == [f"ProfilerStep#{i}" for i in (2, 3, 4)]


def test_off_by_default(base, tmp_path, monkeypatch):
    """By default the profiler is not even created, and the steps are those of the loader."""
    monkeypatch.setattr("minisft.runs.profile.profile", None)
    train(base, tmp_path, train__max_steps=2)
    assert not (tmp_path / "run/profile").exists()
    asked = [config_io.load([*options(base, tmp_path), *more]).run.profile for more in ([], ["--profile"])]
    assert asked == [False, True]
