"""What each memory saver costs and saves: memory, loss and time of the same run with it and without.

    python benchmarks/savers.py MODEL DATA... [--steps 200] [--lr 2e-5] [--seq-len 256] [--only NAME,...] [--json FILE]

MODEL is a Hugging Face folder, DATA conversations; 5% of them are held out. Every variant is a run in a fresh process
with the same seed and the same packs (one a step), bf16 arithmetic, no clipping (which updates in the backward pass
exclude), and a cosine schedule with a tenth of the steps as warm-up.

`peak` is the most anonymous memory (on a GPU, allocated) from the second step to the last; parameters, gradients and
moments are the bytes of the tensors themselves, gradients at their maximum. On a CPU, offloaded moments occupy the same
memory as before. `CPU s` is the CPU time of a step, which other work on the machine does not affect. `nearest` is not
an option of minisft: bf16 parameters rounded to nearest show what stochastic rounding is for.
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

from minisft.lean import adamw
from minisft.lora.nf4 import NF4
from minisft.reports.logged_run import read_log
from minisft.runs import assemble, lifecycle
from minisft.training.optimizer import MOMENTS

BF16 = {"optim.parameters": "bf16"}
SAVERS = {**BF16, "optim.moments": "bf16", "optim.in_backward": "true", "parallel.offload": "optimizer"}
VARIANTS = {
    "fp32 masters": {},
    "bf16 moments": {"optim.moments": "bf16"},
    "bf16 parameters": BF16,
    "in backward": {"optim.in_backward": "true"},
    "offload": {"parallel.offload": "optimizer"},
    "all four": SAVERS,
    "nearest": BF16,
}
COLUMNS = ("peak", "parameters", "gradients", "moments")


class Measured:
    """Notes what is trained, the memory of the process and of its parts, and the processor time of each step."""

    figures: ClassVar[dict[str, float]] = {}
    clock: ClassVar[list[float]] = []

    def __init__(self, model, *args, **options):
        held = [p for p in model.parameters() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(lambda _: self._count(held)) for p in held]
        super().__init__(model, *args, **options)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        frozen += [t for m in model.modules() if isinstance(m, NF4) for t in m.statistics()]
        self.figures |= {"trained": sum(p.numel() for p in held), "frozen": sum(t.nbytes for t in frozen)}

    def _count(self, held: list) -> None:
        storages = [p.grad.untyped_storage() for p in held if p.grad is not None]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self.figures["gradients"] = max(self.figures.get("gradients", 0), size)

    def begin(self, lr, number):
        if number == 1:
            for hook in self._hooks:  # counting takes time
                hook.remove()
            if self.device.type == "cuda":  # reset the peak
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
        self.figures["parameters"] = sum(rows.nbytes for rows in self.rows.values())
        self.figures["moments"] = sum(t.nbytes for moment in MOMENTS for t in self.moments(moment).values())


def run_variant(name: str, argv: list[str]) -> None:
    """One run in this process; its figures of memory are the last line printed."""
    for kind in ("AdamW", "LeanAdamW"):
        setattr(assemble, kind, type(kind, (Measured, getattr(assemble, kind)), {}))
    if name == "nearest":
        adamw.rounded = lambda values, bits: values
    code = lifecycle.main(argv)
    if not code:
        Measured.figures["cpu seconds"] = statistics.median(b - a for a, b in pairwise(Measured.clock))
        print(json.dumps(Measured.figures))
    raise SystemExit(code)


def run_apart(name: str, arguments: argparse.Namespace, run: Path, settings: dict) -> tuple[dict, list[dict]]:
    """Run a variant in a fresh process; returns its figures and its log."""
    (run.parent / "recipe.toml").write_text("")
    given = {"model.path": arguments.model, "data.train": ",".join(arguments.data), "data.template": arguments.template,
             "data.seq_len": arguments.seq_len, "data.cache": run.parent / "cache", "batch.packs": 1,
             "train.max_steps": arguments.steps, "train.epochs": 1000, "optim.lr": arguments.lr, "checkpoint.every": 0,
             "run.dir": run, **settings}
    argv = [str(run.parent / "recipe.toml")]
    for key, value in given.items():
        argv += [f"--{key}", str(value)]
    done = subprocess.run([sys.executable, __file__, "--variant", name, *argv], stdout=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1]), read_log(run)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """The figures of a variant."""
    settings = {"data.eval_fraction": 0.05, "optim.warmup_steps": arguments.steps // 10, "optim.clip_norm": 0}
    figures, log = run_apart(name, arguments, folder / name.replace(" ", "-"), settings | VARIANTS[name])
    losses = [record["loss"] for record in log if record["kind"] == "train"]
    heldout = [record["loss"] for record in log if record["kind"] == "eval"]
    seconds = [record["seconds"] for record in log if record["kind"] == "train"]
    return {**figures, "first": losses[0], "last 50": statistics.mean(losses[-50:]),
            "final": losses[-1], "held-out before": heldout[0], "held-out": heldout[-1],
            "seconds": statistics.median(seconds)}


def main() -> None:
    """Run the variants one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", default="2e-5")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{'':<17}" + "".join(f"{name + ', MiB':>17}" for name in COLUMNS)
          + f"{'last 50 steps':>15}{'final':>9}{'held-out':>10}{'s a step':>10}{'CPU s':>8}", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name in arguments.only.split(","):
            row = rows[name] = measure(name, arguments, Path(folder).absolute())
            print(f"{name:<17}" + "".join(f"{row[column] / 2**20:>17,.1f}" for column in COLUMNS)
                  + f"{row['last 50']:>15.4f}{row['final']:>9.4f}{row['held-out']:>10.4f}{row['seconds']:>10.2f}"
                  f"{row['cpu seconds']:>8.2f}",
                  flush=True)
    print(f"held-out before training: {row['held-out before']:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        run_variant(sys.argv[2], sys.argv[3:])
    main()
