"""Small whole runs for the tests of the loop: arguments, start, log, final weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from minisft.training.trainer import main

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
    argv = options(base, folder, **overrides)
    if ranks == 1:
        assert main(argv) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(HERE.parent / "train.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return log(folder)


def final_weights(folder):
    return load_file(folder / "run" / "final" / "model.safetensors")
