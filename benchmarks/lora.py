"""Adapters against full fine-tuning: trained parameters, memory and speed, on the same packs in turn.

    python benchmarks/lora.py MODEL DATA... [--steps 6] [--rounds 2] [--seq-len 1024] [--only NAME,...] [--json FILE]

MODEL is a Hugging Face folder, DATA conversations. Every turn is a run in a fresh process with the same seed and packs
(one a step) and bf16 arithmetic; the variants take turns for `rounds` rounds. Speed is that of the median step without
the first. Memory is the most that a process needed from the second step to the last: anonymous memory on a CPU,
allocated memory on a GPU. `state` is what persists: weights, gradients and moments.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch

from minisft.lora.nf4 import NF4
from minisft.runs import assemble, lifecycle
from minisft.runs.run_dir import read_log
from minisft.training.optimizer import MOMENTS

VARIANTS = {
    "full": {"optim.lr": 2e-5},
    "LoRA r=8": {"lora.rank": 8},
    "LoRA r=64": {"lora.rank": 64},
    "QLoRA r=8": {"lora.rank": 8, "lora.base": "nf4"},
    "QLoRA r=64": {"lora.rank": 64, "lora.base": "nf4"},
}


class Measured:
    """Notes what is trained, the memory, and the processor time of each step."""

    figures: ClassVar[dict[str, float]] = {}
    clock: ClassVar[list[float]] = []

    def __init__(self, model, *args, **options):
        super().__init__(model, *args, **options)
        trained = sum(rows.numel() for rows in self.rows.values())
        weights = sum(p.nbytes for p in model.parameters())
        weights += sum(t.nbytes for m in model.modules() if isinstance(m, NF4) for t in m.statistics())
        moments = sum(t.nbytes for moment in MOMENTS for t in self.moments(moment).values())
        self.figures.update(trained=trained, state=weights + moments + sum(r.nbytes for r in self.rows.values()))

    def begin(self, lr, number):
        if number == 1:  # the peak begins anew
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")
        super().begin(lr, number)

    def step(self):
        super().step()
        self.clock.append(time.process_time())
        if self.device.type == "cuda":
            self.figures["peak"] = torch.cuda.max_memory_allocated()
        else:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.figures["peak"] = (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024


def run_variant(argv: list[str]) -> None:
    """One run in this process; its figures are the last line printed."""
    for name in ("AdamW", "LeanAdamW"):
        setattr(assemble, name, type(name, (Measured, getattr(assemble, name)), {}))
    code = lifecycle.main(argv)
    if not code:
        Measured.figures["cpu seconds"] = statistics.median(b - a for a, b in pairwise(Measured.clock))
        print(json.dumps(Measured.figures))
    raise SystemExit(code)


def measure(name: str, arguments: argparse.Namespace, folder: Path, turn: int) -> dict:
    """Run a variant in a fresh process and read its log."""
    (folder / "recipe.toml").write_text("")
    run = folder / f"{VARIANTS[name].get('lora.rank', 0)}-{VARIANTS[name].get('lora.base', '')}-{turn}"
    settings = {"model.path": arguments.model, "data.train": ",".join(arguments.data),
                "data.template": arguments.template, "data.seq_len": arguments.seq_len, "data.cache": folder / "cache",
                "batch.packs": 1, "train.max_steps": arguments.steps, "train.epochs": 1000, "optim.lr": arguments.lr,
                "optim.warmup_steps": 0, "checkpoint.every": 0, "run.dir": run, **VARIANTS[name]}
    argv = [str(folder / "recipe.toml")]
    for key, value in settings.items():
        argv += [f"--{key}", str(value)]
    done = subprocess.run([sys.executable, __file__, "--variant", *argv], stdout=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}")
    log = read_log(run)
    steps = [record for record in log if record["kind"] == "train"]
    return {**json.loads(done.stdout.splitlines()[-1]), "loss": steps[-1]["loss"],
            "tokens/s": statistics.median(record["tokens_per_second"] for record in steps[1:]),
            "tokens a step": statistics.mean(record["tokens"] for record in steps[1:])}


def main() -> None:
    """Run the variants in turn, and print the table of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    turns: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for turn in range(arguments.rounds):
            for name in names:
                turns[name].append(measure(name, arguments, Path(folder).absolute(), turn))
                print(f"turn {turn + 1}: {name}: {turns[name][-1]['tokens/s']:,.0f} tokens/s", flush=True)
    print(f"{'':<12}{'trained':>13}{'share':>9}{'state, MiB':>12}{'peak, MiB':>11}{'tokens/s':>10}{'CPU s':>8}"
          f"{'loss':>9}")
    whole = turns.get("full", [{}])[0].get("trained")
    for name, found in turns.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        share = f"{row['trained'] / whole:.2%}" if whole else ""
        print(f"{name:<12}{int(row['trained']):>13,}{share:>9}{row['state'] / 2**20:>12,.0f}"
              f"{row['peak'] / 2**20:>11,.0f}{row['tokens/s']:>10,.0f}{row['cpu seconds']:>8.2f}{row['loss']:>9.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        run_variant(sys.argv[2:])
    main()
