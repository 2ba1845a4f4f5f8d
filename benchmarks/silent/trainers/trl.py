"""TRL's SFTTrainer, as its documentation sets it up, and with its switches the other way.

    trl                assistant_only_loss, `bfd` packing where the exhibit packs, the default attention (sdpa on a CPU)
    trl-unpacked       packing off everywhere
    trl-eager          attn_implementation="eager"
    trl-defaults       without assistant_only_loss, which is off by default
    trl-bf16-weights   model_init_kwargs={"dtype": "bfloat16"}, as many scripts have it

Rows are the data set and the collator that the trainer has made; weights are what `save_model` writes. Nothing is
patched or subclassed. Its advice for packing is FlashAttention, which no CPU has: that row was not run.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # a rank under torchrun: sys.path begins with this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from silent.world import CannotError, Job, NotApplicableError, Row, Run, Trainer, World

VARIANTS = {
    "": "assistant_only_loss=True, packing_strategy='bfd' where the exhibit packs, default attention (sdpa)",
    "unpacked": "the same, packing=False everywhere", "eager": "the same, attn_implementation='eager'",
    "defaults": "assistant_only_loss and packing at their defaults, which is off",
    "bf16-weights": "the same as trl, model_init_kwargs={'dtype': 'bfloat16'}"}
UNPACKED = ("unpacked", "defaults")


def open_trainer(name: str, variant: str) -> "Trl":
    """A column."""
    return Trl(name, variant)


class Trl(Trainer):
    """SFTTrainer in this process; several ranks are torchrun of this file."""

    def __init__(self, name: str, variant: str):
        import datasets
        import torch
        import transformers
        import trl

        datasets.disable_progress_bars()
        datasets.disable_caching()
        self.name, self.variant, self.about = name, variant, VARIANTS[variant]
        self.versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"

    def open(self, job: Job, folder: Path, model: Path, **settings):
        """An SFTTrainer."""
        import datasets
        from trl import SFTConfig, SFTTrainer

        chat, variant = "messages" in job.data[0], self.variant
        init = {"bf16-weights": {"dtype": "bfloat16"}, "eager": {"attn_implementation": "eager"}}.get(variant, {})
        config = SFTConfig(**{
            "output_dir": str(folder / "run"), "assistant_only_loss": chat and variant != "defaults",
            "packing": job.packing and variant not in UNPACKED, "max_length": job.length,
            "per_device_train_batch_size": job.rows, "per_device_eval_batch_size": job.rows,
            "gradient_accumulation_steps": job.accumulate, "learning_rate": job.lr, "lr_scheduler_type": "constant",
            "adam_beta1": job.betas[0], "adam_beta2": job.betas[1], "adam_epsilon": job.eps,
            "weight_decay": job.decay, "max_grad_norm": 0.0, "bf16": job.precision == "bf16", "use_cpu": True,
            "max_steps": job.steps or -1, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "model_init_kwargs": init,
            "train_sampling_strategy": "random" if job.shuffle else "sequential", **settings})
        if isinstance(job.data[0], str):  # lines as they stand
            (folder / "data.jsonl").write_text("\n".join(job.data))
            data = datasets.load_dataset("json", data_files=str(folder / "data.jsonl"), split="train",
                                         cache_dir=str(folder / "cache"))
        else:
            data = datasets.Dataset.from_list(list(job.data))
        return SFTTrainer(str(model), config, train_dataset=data,
                          eval_dataset=datasets.Dataset.from_list(list(job.held_out)) if job.held_out else None)

    def rows(self, job: Job, world: World) -> list[Row]:
        trainer = refusing(lambda: self.open(job, world.run_folder(), world.model(job.model)))
        found = []
        for example in trainer.train_dataset:
            batch = trainer.data_collator([example])
            ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
            start = 0
            for length in example.get("seq_lengths", [len(ids)]):
                found.append(Row(ids[start : start + length], labels[start : start + length]))
                start += length
        return found

    def train(self, job: Job, world: World) -> Run:
        if job.packing and self.variant in UNPACKED and not job.held_out:
            raise NotApplicableError("packing is off")
        folder, model = world.run_folder(), world.model(job.model)
        if job.ranks > 1:
            (folder / "job.json").write_text(json.dumps([asdict(job), str(model), self.name, self.variant]))
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job.ranks), "--rdzv-backend",
                 "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, str(folder)], capture_output=True, text=True,
                check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise CannotError(done.stderr.strip().splitlines()[-1])
            return Run(json.loads((folder / "losses.json").read_text()), [], folder / "final")
        return refusing(lambda: self.run(job, folder, model))

    def run(self, job: Job, folder: Path, model: Path) -> Run:
        """Train, evaluate and save."""
        held_out = []
        if job.stop:  # a run that is stopped, and the same started again with resume_from_checkpoint
            first = self.open(job, folder, model, save_strategy="steps", save_steps=job.stop)
            first.add_callback(stop_after(job.stop))
            first.train()
        trainer = self.open(job, folder, model)
        if job.held_out:
            held_out.append(trainer.evaluate()["eval_loss"])
        trainer.train(resume_from_checkpoint=True if job.stop else None)
        if job.held_out:
            held_out.append(trainer.evaluate()["eval_loss"])
        trainer.save_model(str(folder / "final"))
        return Run([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], held_out,
                   folder / "final")


def stop_after(step: int):
    """The documented way to stop a run."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= step

    return Stop()


def refusing(work):
    """An error that the trainer raises itself is a refusal."""
    try:
        return work()
    except (ValueError, KeyError, RuntimeError) as error:
        raise CannotError(f"{type(error).__name__}: {error}"[:300]) from error


def main() -> None:
    """One rank."""
    folder = Path(sys.argv[1])
    fields, model, name, variant = json.loads((folder / "job.json").read_text())
    run = Trl(name, variant).run(Job(**{**fields, "data": tuple(fields["data"]), "betas": tuple(fields["betas"])}),
                                 folder, Path(model))
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(run.losses))


if __name__ == "__main__":
    main()
