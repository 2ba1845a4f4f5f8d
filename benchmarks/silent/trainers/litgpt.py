"""litgpt's command `litgpt finetune_full`.

    litgpt            data JSON with mask_prompt=True and prompt_style="llama3"
    litgpt-defaults   mask_prompt as it is by default, which is off
    litgpt-bf16-true  precision "bf16-true" where an exhibit asks for bf16 ("bf16-mixed" otherwise)

Its format has one question and one answer, and a system turn ("You are a helpful assistant.") if the record has none,
so exhibits about a step take its own rows as right. It warms up from a rate of 0 for at least one step and then
follows a cosine: a step is asked for as two on the same data, the first with a rate of 0. Rows are SFTDataset's.
Weights are read with `convert_lit_checkpoint`.
"""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from silent.world import CannotError, Job, NotApplicableError, Row, Run, Trainer, World

VARIANTS = {"": "JSON(mask_prompt=True, prompt_style='llama3'), bf16-mixed",
            "defaults": "mask_prompt at its default, off",
            "bf16-true": "the same as litgpt, precision='bf16-true'"}


def open_trainer(name: str, variant: str) -> "Litgpt":
    """A column."""
    return Litgpt(name, variant)


class Litgpt(Trainer):
    """The command, in a process of its own."""

    jobs = 2
    own_format = True

    def __init__(self, name: str, variant: str):
        from importlib.metadata import version

        self.name, self.variant, self.about = name, variant, VARIANTS[variant]
        self.versions = ", ".join(f"{package} {version(package)}" for package in ("litgpt", "lightning", "torch"))

    def rates(self, steps: int) -> list[float]:
        return [0.0, *((1 + math.cos(math.pi * i / (steps - 1))) / 2 for i in range(steps - 1))]

    def data(self, job: Job, folder: Path) -> dict:
        """Arguments of its JSON data module, with val.json beside train.json."""
        files = folder / "data"
        files.mkdir()
        for name, records in (("train", job.data), ("val", job.held_out or job.data)):
            (files / f"{name}.json").write_text(f"[{', '.join(pair(record) for record in records)}]")
        mask = {} if self.variant == "defaults" else {"mask_prompt": True}
        return {"json_path": str(files), "num_workers": 0, **mask,
                "prompt_style": "default" if "prompt" in job.data[0] else "llama3"}

    def rows(self, job: Job, world: World) -> list[Row]:
        from litgpt.data import JSON
        from litgpt.prompts import Default, Llama3
        from litgpt.tokenizer import Tokenizer

        if job.packing:
            raise NotApplicableError("it does not pack")
        arguments = self.data(job, world.run_folder())
        style = {"default": Default, "llama3": Llama3}[arguments["prompt_style"]]()
        data = JSON(**{**arguments, "json_path": Path(arguments["json_path"]), "prompt_style": style})
        data.connect(Tokenizer(checkpoint(world, job.model)), 1, job.length)
        data.setup()
        return [Row(x["input_ids"].tolist(), x["labels"].tolist()) for x in data.train_dataset]

    def train(self, job: Job, world: World) -> Run:
        if job.packing:
            raise NotApplicableError("it does not pack")
        if job.ranks > 1:
            raise CannotError("several ranks are FSDP, which Lightning has on GPUs only")
        folder = world.run_folder()
        steps = job.steps + 1 if job.steps == 1 else job.steps
        bf16 = "bf16-true" if self.variant == "bf16-true" else "bf16-mixed"
        recipe = {
            "checkpoint_dir": str(checkpoint(world, job.model)), "out_dir": str(folder / "out"),
            "precision": "32-true" if job.precision == "fp32" else bf16,
            "data": {"class_path": "litgpt.data.JSON", "init_args": self.data(job, folder)},
            "train": {"save_interval": job.stop or None, "log_interval": 1, "lr_warmup_steps": 1,
                      "global_batch_size": job.rows * job.accumulate, "micro_batch_size": job.rows,
                      "epochs": steps or 1, "max_steps": steps, "max_seq_length": job.length},
            "eval": {"interval": 10**6, "max_new_tokens": 1, "max_iters": 10**6, "initial_validation": True,
                     "final_validation": True},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {
                "lr": job.lr, "eps": job.eps, "betas": job.betas, "weight_decay": job.decay}}}
        finetune(recipe, folder)
        out = folder / "out"
        if job.stop:  # the same command from the checkpoint that the first run left on its way
            saved, out = out / f"step-{job.stop:06d}" / "lit_model.pth", folder / "resumed"
            finetune({**recipe, "resume": str(saved), "out_dir": str(out)}, folder)
        with next(out.rglob("metrics.csv")).open() as file:
            records = list(csv.DictReader(file))
        losses, held_out = ([float(r[name]) for r in records if r.get(name)] for name in ("loss", "val_loss"))
        return Run(losses[-1:] if job.steps == 1 else losses, held_out, exported(out / "final"))


def finetune(recipe: dict, folder: Path) -> None:
    """`litgpt finetune_full --config FILE`"""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    done = subprocess.run([sys.executable, "-m", "litgpt", "finetune_full", "--config", str(file)], text=True,
                          capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        raise CannotError(done.stderr.strip().splitlines()[-1][:300])


def pair(record: dict | str) -> str:
    """A record in its form, as JSON; what else the record has stays in it."""
    if isinstance(record, str):  # a line as it stands, in which keys may stand twice
        both = [{"messages": value} for _, value in json.loads(record, object_pairs_hook=objects)]
        first, *others = (json.loads(pair(record)) for record in both)
        return json.dumps(first)[:-1] + "".join(f', "output": {json.dumps(x["output"])}' for x in others) + "}"
    if "prompt" in record:
        other = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
        return json.dumps({"instruction": record["prompt"], "output": record["completion"], **other})
    system = [m["content"] for m in record["messages"] if m["role"] == "system"]
    rest = [m["content"] for m in record["messages"] if m["role"] != "system"]
    if len(rest) != 2:
        raise NotApplicableError("a record has one question and one answer")
    return json.dumps({"instruction": rest[0], "output": rest[1]} | ({"sys_prompt": system[0]} if system else {}))


def objects(pairs: list[tuple[str, object]]) -> object:
    """An object of JSON; the outer one, with `messages`, as its pairs."""
    return pairs if pairs[0][0] == "messages" else dict(pairs)


def lit_config(folder: Path):
    """Its Config of a Hugging Face folder of a Llama."""
    from litgpt import Config

    shape = json.loads((folder / "config.json").read_text())
    return Config(name="Llama-3-tiny", hf_config={}, block_size=shape["max_position_embeddings"],
                  n_layer=shape["num_hidden_layers"], n_embd=shape["hidden_size"],
                  n_head=shape["num_attention_heads"], n_query_groups=shape["num_key_value_heads"],
                  head_size=shape["head_dim"], vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"],
                  bias=False, parallel_residual=False, rotary_percentage=1.0, norm_class_name="RMSNorm",
                  norm_eps=shape["rms_norm_eps"], mlp_class_name="LLaMAMLP",
                  intermediate_size=shape["intermediate_size"], rope_base=int(shape["rope_theta"]))


def checkpoint(world: World, name: str) -> Path:
    """A model in its form, in a folder that is named as Llama-3's are, which is how it knows that there is a BOS."""
    import shutil

    import torch
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config
    from safetensors.torch import load_file

    base = world.model(name)
    folder = world.folder / "lit" / name / "Llama-3-tiny"
    if not folder.exists():
        shutil.copytree(base, folder)
        config, weights = lit_config(base), {}
        copy_weights_hf_llama(config, {}, weights, load_file(base / "model.safetensors"))
        torch.save(weights, folder / "lit_model.pth")
        save_config(config, folder)
        (folder / "model.safetensors").unlink()
    return folder


def exported(folder: Path) -> Path:
    """The folder that it leaves, with its weights under Hugging Face's names."""
    import torch
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
    from safetensors.torch import save_file

    out = folder.parent / "hf"
    convert_lit_checkpoint(folder, out)
    weights = torch.load(out / "model.pth", weights_only=True)
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder
