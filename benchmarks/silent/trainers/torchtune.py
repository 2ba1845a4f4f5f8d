"""torchtune 0.6.1's command `tune run full_finetune_single_device`, or `_distributed` on several ranks, on the CPU.

Data are `chat_dataset` with `conversation_style: openai` (`packed` where the exhibit packs), the tokenizer is
`llama3_tokenizer` on a tiktoken file of the same vocabulary. The recipe's own dtype is bf16, weights included; it is
used where an exhibit asks for bf16, and fp32 otherwise. It trains the answer's header and ends each row in
`<|end_of_text|>`, so exhibits about a step take its own rows as right. Checkpoints are saved between epochs: a resumed
run is one whose last epoch has been deleted. Rows are those of the data set.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from silent.world import SPECIAL, CannotError, Job, NotApplicableError, Row, Run, Trainer, World

OTHERS = ("<|step_id|>", "<|eom_id|>", "<|python_tag|>", "<|image|>")  # never written, but asked for


def open_trainer(name: str, variant: str) -> "Torchtune":
    """The column."""
    return Torchtune(name)


class Torchtune(Trainer):
    """The command, in a process of its own."""

    jobs = 2
    own_format = True
    about = "full_finetune_single_device with chat_dataset; bf16 means weights in bf16 too"

    def __init__(self, name: str):
        from importlib.metadata import version

        self.name = name
        self.versions = ", ".join(f"{package} {version(package)}" for package in ("torchtune", "torchao", "torch"))

    def parts(self, job: Job, world: World) -> tuple[dict, dict]:
        """The sections `tokenizer` and `dataset`."""
        if "messages" not in job.data[0]:
            raise NotApplicableError("has no data set of prompts and completions as they stand: all become turns")
        names = [*SPECIAL, *OTHERS]
        known = [world.tokenizer.token_to_id(name) for name in SPECIAL]
        ids = [*known, *range(max(known) + 1, max(known) + 1 + len(OTHERS))]
        return ({"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": str(tiktoken_file(world)),
                 "max_seq_len": job.length, "special_tokens_path": special_tokens(world, names, ids)},
                {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "split": "train",
                 "data_files": str(world.write(job.data)), "conversation_column": "messages",
                 "conversation_style": "openai", "packed": job.packing})

    def rows(self, job: Job, world: World) -> list[Row]:
        from torchtune.datasets import chat_dataset
        from torchtune.models.llama3 import llama3_tokenizer

        tokenizer, dataset = ({k: v for k, v in part.items() if k != "_component_"} for part in self.parts(job, world))
        found = []
        for example in chat_dataset(llama3_tokenizer(**tokenizer), **dataset):
            ids, labels = list(map(int, example["tokens"])), list(map(int, example["labels"]))
            start = 0
            for length in map(int, example.get("seq_lens", [len(ids)])):
                found.append(Row(ids[start : start + length], labels[start : start + length]))
                start += length
        return [row for row in found if len(set(row.ids)) > 1]  # a pack's padding is a document of its own

    def train(self, job: Job, world: World) -> Run:
        folder, base = world.run_folder(), world.model(job.model)
        if job.held_out:
            raise CannotError("the recipe has no held-out loss")
        if job.stop and job.steps is None:
            raise CannotError("checkpoints are saved between epochs only")
        if job.stop and len(job.data) > 1:
            raise CannotError("this adapter resumes between epochs only")
        shape = json.loads((base / "config.json").read_text())
        tied = shape["tie_word_embeddings"]
        tokenizer, dataset = self.parts(job, world)
        recipe = {
            "output_dir": str(folder / "out"), "tokenizer": tokenizer, "dataset": dataset, "seed": 0,
            "shuffle": job.shuffle, "batch_size": job.rows, "epochs": job.steps or 1, "max_steps_per_epoch": None,
            "model": {"_component_": "torchtune.models.llama3_2.llama3_2" if tied else "torchtune.models.llama3.llama3",
                      "vocab_size": shape["vocab_size"], "num_layers": shape["num_hidden_layers"],
                      "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"],
                      "embed_dim": shape["hidden_size"], "max_seq_len": shape["max_position_embeddings"],
                      "intermediate_dim": shape["intermediate_size"], "norm_eps": shape["rms_norm_eps"],
                      "rope_base": int(shape["rope_theta"]), **({"scale_factor": 1} if tied else {})},
            "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(base),
                             "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
                             "output_dir": str(folder / "out"), "model_type": "LLAMA3_2" if tied else "LLAMA3"},
            "resume_from_checkpoint": False, "gradient_accumulation_steps": job.accumulate,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": job.lr, "eps": job.eps, "betas": list(job.betas),
                          "weight_decay": job.decay},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}, "optimizer_in_bwd": False,
            "clip_grad_norm": None, "compile": False, "device": "cpu", "dtype": job.precision,
            "enable_activation_checkpointing": False, "enable_activation_offloading": False,
            "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger",
                              "log_dir": str(folder / "logs"), "filename": "log.txt"},
            "log_every_n_steps": 1, "log_peak_memory_stats": False, "fsdp_cpu_offload": False}
        tune(recipe, folder, job.ranks)
        last = max((folder / "out").glob("epoch_*"), key=lambda path: int(path.name.split("_")[1]))
        if job.stop:
            last.rename(folder / "before")
            recipe["resume_from_checkpoint"] = True
            before = max((folder / "out").glob("epoch_*"), key=lambda path: int(path.name.split("_")[1]))
            recipe["checkpointer"]["checkpoint_files"] = [
                str(file.relative_to(folder / "out")) for file in before.glob("*.safetensors")]
            tune(recipe, folder, job.ranks)
        losses = [float(x) for x in re.findall(r"loss:([-\w.]+)", (folder / "logs" / "log.txt").read_text())]
        return Run(losses, [], last)


def tiktoken_file(world: World) -> Path:
    """The vocabulary as tiktoken has it: bytes and rank, a line each. Ranks are the ids, and the order of merges."""
    path = world.folder / "tokenizer.model"
    if not path.exists():
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2: these bytes stand for themselves
        shown = {chr(byte): byte for byte in printable}
        shown |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
        vocabulary = sorted(world.tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(bytes(shown[c] for c in text)).decode()} {rank}\n" for text, rank in vocabulary]
        path.write_text("".join(lines))
    return path


def special_tokens(world: World, names: list[str], ids: list[int]) -> str:
    """A tokenizer.json that says which id each special token has."""
    path = world.folder / "special.json"
    path.write_text(json.dumps({"added_tokens": [{"content": name, "id": i} for name, i in
                                                 zip(names, ids, strict=True)]}))
    return str(path)


def tune(recipe: dict, folder: Path, ranks: int) -> None:
    """`tune run RECIPE --config FILE`"""
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    several = ["--nproc_per_node", str(ranks)] if ranks > 1 else []
    name = f"full_finetune_{'distributed' if ranks > 1 else 'single_device'}"
    done = subprocess.run([str(Path(sys.executable).parent / "tune"), "run", *several, name, "--config", str(file)],
                          capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"(\[rank0\]: )?\w*(Error|Exception)\b", line)]
        raise CannotError((errors or done.stderr.strip().splitlines())[-1][:300])
