"""What a precision costs in quality: `python benchmarks/precision.py MODEL DATA [--steps 200] [--seeds 3]`.

The same run for each precision and seed, with the same documents in the same order: the mean training loss of the last
tenth of the steps, and the loss on a held-out tenth of the data. On a CPU, bf16 and FP8 are computed by definition, so
the figures say what a GPU loses, not how fast it is. A precision is called worse if its held-out loss is above that of
fp32 by more than the seeds differ among themselves. `--jobs` runs several at once, where there is room for them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
WAYS = {"fp32": ["--train.precision", "fp32"], "bf16": ["--train.precision", "bf16"],
        "fp8, tensor": ["--train.precision", "fp8"],
        "fp8, row": ["--train.precision", "fp8", "--train.fp8_scale", "row"]}


def trained(options: argparse.Namespace, way: str, seed: int, folder: Path) -> tuple[float, float]:
    """The training loss and the held-out loss at the end of one run."""
    run = folder / f"{way.replace(', ', '-')}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--model.path", options.model, "--data.train", options.data,
               "--data.template", options.template, "--data.eval_fraction", "0.1",
               "--data.seq_len", str(options.seq_len), "--data.cache", str(folder / "cache"),
               "--batch.packs", str(options.packs), "--train.epochs", "1000",
               "--train.max_steps", str(options.steps), "--train.seed", str(seed), "--optim.warmup_steps", "10",
               "--optim.lr", str(options.lr), "--checkpoint.every", "0", "--run.export", "false", "--run.dir", str(run)]
    subprocess.run([*command, *WAYS[way]], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return mean(losses[-max(1, len(losses) // 10) :]), next(
        record["loss"] for record in reversed(records) if record["kind"] == "eval")


def main() -> None:
    """Train, and print a line a run and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    for name, default in (("template", "chatml"), ("steps", 200), ("seeds", 3), ("seq-len", 256), ("packs", 1),
                          ("lr", 2e-5), ("jobs", 1)):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    runs = [(way, seed) for seed in range(options.seeds) for way in WAYS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as jobs:
        for (way, seed), losses in zip(runs, jobs.map(lambda run: trained(options, *run, Path(folder)), runs),
                                       strict=True):
            found[way].append(losses)
            print(f"seed {seed}  {way:<12} trained {losses[0]:.4f}  held out {losses[1]:.4f}", flush=True)
    spread = stdev(held for _, held in found["fp32"]) if options.seeds > 1 else 0.0
    print(f"\n{'':<12}{'trained':>10}{'held out':>10}   above fp32 with the same seed, held out (seeds differ by "
          f"{spread:.4f})")
    for way, losses in found.items():
        above = [held - exact for (_, held), (_, exact) in zip(losses, found["fp32"], strict=True)]
        worse = "  worse" if mean(above) > spread else ""
        print(f"{way:<12}{mean(loss for loss, _ in losses):>10.4f}{mean(held for _, held in losses):>10.4f}   "
              + ", ".join(f"{rise:+.4f}" for rise in above) + worse)


if __name__ == "__main__":
    main()
