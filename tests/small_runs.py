"""Small whole runs for the tests of the loop: arguments, start, log, final weights."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from minisft.runs.lifecycle import main

HERE = Path(__file__).parent


def options(base, folder, **overrides):
    """Command-line arguments of a small run: fp32, every conversation of the oracle, a constant rate."""
    recipe = folder / "recipe.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text("")
    settings = {
        "model.path": base, "data.train": HERE / "oracles" / "conversations.jsonl", "data.template": "llama3",
        "data.seq_len": 512, "data.cache": folder / "cache", "train.precision": "fp32", "train.max_steps": 10,
        "train.epochs": 100, "optim.lr": 1e-3, "optim.schedule": "constant", "optim.warmup_steps": 0,
        "batch.packs": 4, "run.dir": folder / "run", **{k.replace("__", "."): v for k, v in overrides.items()},
    }
    return [str(recipe), *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def log(folder, kind="train"):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train(base, folder, *, ranks=1, **overrides):
    """Run train.py on `ranks` processes and return its log."""
    if ranks == 1:
        assert main(options(base, folder, **overrides)) == 0
    else:
        with launch(base, folder, ranks=ranks, **overrides) as torchrun:
            printed = torchrun.communicate(timeout=300)[0]
        assert torchrun.returncode == 0, printed
    return log(folder)


def final_weights(folder):
    return load_file(folder / "run" / "final" / "model.safetensors")


def launch(base, folder, *, ranks=1, extra=(), program=(HERE.parent / "train.py",), **overrides):
    """Start `program` (train.py, or planted.py with its fault) under torchrun with `extra` options."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", *extra, *map(str, program), *options(base, folder, **overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
                            start_new_session=True)


def wait_for_step(folder, step, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "run" / "metrics.jsonl").exists() and len(log(folder)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


def wait_for_savers():
    """The save that was under way when a run died in this process is complete, whatever the machine's load."""
    for thread in threading.enumerate():
        if thread.name == "saver":
            thread.join()


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


def assert_same(folder, uninterrupted):
    """The run is done, with the log and the final weights of `uninterrupted`, a (log, weights), bit for bit."""
    records, weights = uninterrupted
    names = ("step", "epoch", "tokens", "target_tokens", "loss", "grad_norm", "lr")
    assert figures(log(folder), *names) == figures(records, *names)
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(folder).items())
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "done"


def figures(records, *names):
    return [[record[name] for name in names] for record in records]


def room_of_files(base, room):
    """`room`, with something of every kind that a command reads, and a run."""
    train(base, room, train__max_steps=1)
    shutil.copytree(base, room / "model")
    for name in ("data", "general"):
        shutil.copy(HERE / "oracles" / "conversations.jsonl", room / f"{name}.jsonl")
    files = {
        "recipe.toml": '[model]\npath = "model"\n[data]\ntrain = ["data.jsonl"]\ngeneral = ["general.jsonl"]\n'
                       f'template = "llama3"\nseq_len = 512\ncache = "{room}/cache"\n',
        "sky_test.csv": "How many moons has Mars?,one,two,B\n",
        "questions.jsonl": '{"question_id": 1, "turns": ["hi"]}\n',
        "told.jsonl": '{"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n',
        "scores.jsonl": '{"question_id": 1, "model": "m", "score": 7}\n',
        **{f"{name}.jsonl": f'{{"question_id": 1, "model_id": "{name}", "choices": [{{"turns": ["{name}"]}}]}}\n'
           for name in ("one", "two")}}
    for name, text in files.items():
        (room / name).write_text(text)
    return room
