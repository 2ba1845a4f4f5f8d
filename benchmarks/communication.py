"""The cost of a second process: one with two threads against two with one thread each.

    python benchmarks/communication.py MODEL DATA TEMPLATE [--packs N] [--seq-len N] [--steps N] [--rounds N]

Both train the same batches with train.py, on as many cores and with as many tokens a forward pass; the two processes
share the model and communicate over gloo, in the memory of one machine. They take turns; the rate is that of the steps
after the first. Not all of the loss is communication: a second process runs Python too, and each waits for the slower
one, while threads that share a matrix product wait for each other inside it. The last line says how much of the two
ranks' time passes in collectives and in waiting for them, from a run with --profile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from minisft.model.llama import Llama
from minisft.model.llama_config import read_config

ROOT = Path(__file__).parent.parent


def run(options: argparse.Namespace, folder: Path, ranks: int, threads: int, *more: str) -> float:
    """Return the tokens a second of a run, without its first step."""
    recipe = folder / "empty.toml"
    recipe.write_text("")
    settings = {"model.path": options.model, "data.train": options.data, "data.template": options.template,
                "data.seq_len": options.seq_len, "data.cache": folder / "cache", "batch.packs": options.packs,
                "train.max_steps": options.steps + 1, "train.precision": options.precision, "checkpoint.every": 0}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "train.py"), str(recipe),
               *(str(part) for key, value in settings.items() for part in (f"--{key}", value)), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    written = Path(more[more.index("--run.dir") + 1], "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, written) if record["kind"] == "train"][1:]
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def main() -> None:
    """Run both in turn, and print their rates and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("template")
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    ways, rates = {"1 rank, 2 threads": (1, 2), "2 ranks, 1 thread": (2, 1)}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(options.rounds):
            for j, (way, (ranks, threads)) in enumerate(ways.items()):
                rate = run(options, folder, ranks, threads, "--run.dir", str(folder / f"run-{i}-{j}"))
                rates.setdefault(way, []).append(rate)
        for way, found in rates.items():
            print(f"{way}: {median(found):,.0f} tokens/s ({min(found):,.0f}, {max(found):,.0f}), {options.precision}")
        one, two = (median(found) for found in rates.values())
        numbers = sum(p.numel() for p in Llama(read_config(options.model)).parameters())
        print(f"overhead {1 - two / one:.1%}; {numbers:,} parameters, gathered and reduced "
              f"{options.packs // 2} times a step")
        options.steps = 5
        run(options, folder, 2, 1, "--run.dir", str(folder / "profiled"), "--profile")
        table = (folder / "profiled/profile/table.txt").read_text()
        print("of two ranks' time:", "; ".join(" ".join(found) for found in re.findall(
            r"([\d.]+%)  (communication|sharding|Python, dispatch, waiting)", table)))


if __name__ == "__main__":
    main()
