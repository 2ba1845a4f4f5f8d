"""minisft, asked through its commands: `minisft prepare --dump` for rows, train.py for everything else.

Every run is a process of its own. Losses come from metrics.jsonl, weights from `final/`, and for a run in bf16, whose
`final/` is in bf16 as well, from the fp32 masters in the last checkpoint.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from silent.world import IGNORED, CannotError, Job, Row, Run, Trainer, World

ROOT = Path(__file__).resolve().parents[3]


def open_trainer(name: str, variant: str) -> "Minisft":
    """The column."""
    return Minisft()


class Minisft(Trainer):
    """The commands of this repository."""

    name, about = "minisft", "minisft prepare --dump, train.py, metrics.jsonl, final/"
    jobs = 2

    def __init__(self):
        sys.path.insert(0, str(ROOT))
        from minisft import __version__
        self.versions = f"minisft {__version__}, torch {torch.__version__}"

    def settings(self, job: Job, world: World) -> dict[str, object]:
        """Keys of the recipe."""
        chat = "messages" in job.data[0]
        return {"model.path": world.model(job.model), "data.train": world.write(job.data),
                "data.template": "llama3" if chat else "text", "data.seq_len": job.length,
                "data.overlong": "truncate", "data.shuffle": str(job.shuffle).lower(),
                "data.cache": world.folder / "cache"}

    def rows(self, job: Job, world: World) -> list[Row]:
        dump = world.run_folder() / "dump.jsonl"
        call(["-m", "minisft", "prepare", *options(self.settings(job, world)), "--dump", str(dump)])
        documents = [json.loads(line) for line in dump.read_text().splitlines()]
        return [Row(d["ids"], [i if trained else IGNORED for i, trained in zip(d["ids"], d["trained"], strict=True)])
                for d in documents]

    def train(self, job: Job, world: World) -> Run:
        folder = world.run_folder()
        size = job.rows * job.accumulate * job.ranks
        settings = self.settings(job, world) | {
            "batch.packs": size, "batch.micro_packs": job.rows, "train.precision": job.precision, "train.epochs": 1,
            "optim.lr": job.lr, "optim.eps": job.eps, "optim.betas": list(job.betas), "optim.schedule": "constant",
            "optim.warmup_steps": 0, "optim.weight_decay": job.decay, "optim.clip_norm": 0, "run.dir": folder / "run"}
        if job.steps:
            settings |= {"train.max_steps": job.steps, "train.epochs": job.steps}
        if job.held_out:
            settings["data.eval"] = world.write(job.held_out, "held-out")
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(job.ranks), "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", "127.0.0.1:0"] if job.ranks > 1 else []
        if job.stop:  # the first part ends with a checkpoint; the same command without the limit resumes from it
            call([*ranks, str(ROOT / "train.py"), *options(settings | {"train.max_steps": job.stop})])
        call([*ranks, str(ROOT / "train.py"), *options(settings)])
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        final = folder / "run" / "final"
        if job.precision == "bf16":
            last = sorted((folder / "run" / "checkpoints").iterdir())[-1] / "rank-0.safetensors"
            masters = {name.removeprefix("weights/"): tensor for name, tensor in load_file(last).items()
                       if name.startswith("weights/")}
            save_file(masters, final / "model.safetensors", metadata={"format": "pt"})
        return Run([r["loss"] for r in records if r["kind"] == "train"],
                   [r["loss"] for r in records if r["kind"] == "eval"], final)


def options(settings: dict[str, object]) -> list[str]:
    """As arguments."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def call(arguments: list[str]) -> None:
    """Run a command of minisft; a refusal becomes CannotError with its message."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    if done.returncode:
        lines = done.stderr.splitlines()
        raise CannotError(next((line for line in lines if line.startswith("error")), lines[-1] if lines else "?"))
    print(done.stdout, done.stderr, file=sys.stderr)  # run.look hears it
