"""One system in one process: it trains the documents it is given, one step each time it is told to.

throughput.py starts `python benchmarks/peers.py SYSTEM JOB` with the Python that has the system installed, writes
"step" to its standard input and reads {seconds, cpu_seconds, loss, peak_gib} from its standard output. JOB is a JSON
file: the model, the precision, and the documents of every step, tokenised: [step][pack][document] of {"ids",
"trained"}.

Each system is set up as its own trainer or recipe does it, in the fastest way that trains the same tokens with isolated
documents, on the GPU if there is one: AdamW (fused) at a constant learning rate on fp32 parameters, gradients clipped
to norm 1 if the system clips, all activations kept, as many packs in one forward pass as the job says. A step's seconds
go from making the batch to the updated parameters.

    minisft              runs/lifecycle.py's steps
    minisft-bf16-weights the same with optim.parameters and optim.moments in bf16
    trl                  SFTTrainer with bfd packing and its default loss, `sdpa`; bf16 is autocast
    trl-compile          trl with torch_compile=True
    trl-bf16-weights     trl with the parameters in bf16 as well: small updates are lost
    trl-liger            trl with use_liger_kernel=True; only on a GPU, if liger_kernel is installed
    trl-flash            trl with flash_attention_2; only on a GPU, if flash_attn is installed
    transformers         a plain loop around LlamaForCausalLM: `sdpa`, positions that restart, its own loss; bf16 is
                         autocast
    torchtune            the parts of recipes/full_finetune_single_device.py; bf16 means parameters in bf16 as well
    torchtune-compile    torchtune with `compile: True`
    litgpt               the steps of litgpt/finetune/full.py, all documents of a step padded to the longest
    litgpt-single        litgpt with its default micro-batch of one document: no padding, and a mean of means as loss
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

CLIP = 1.0
BETAS, EPS = (0.9, 0.95), 1e-8
IGNORED = -100


class Turn:
    """Waits until the driver lets this process work, and reports each step to it."""

    def __init__(self, out):
        self.out, self.started = out, (0.0, 0.0)

    def begin(self) -> None:
        """Wait for the driver's word; ends the process if the driver is gone."""
        if sys.stdin.readline().strip() != "step":
            raise SystemExit(0)
        finish()
        self.started = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        """Report a step."""
        finish()
        seconds, cpu_seconds = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_gib": peak_gib()}),
              file=self.out, flush=True)


def device():
    """Return the GPU, or the CPU without one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Return the peak of memory allocated on the GPU, or without one of this process's resident memory.

    Not ru_maxrss, which starts from the parent's.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def in_micro_batches(packs: list, job: SimpleNamespace) -> list[list]:
    """Group the packs of a step into those that go through the network together."""
    return [packs[i : i + job.micro_packs] for i in range(0, len(packs), job.micro_packs)]


def labels(document: dict) -> list[int]:
    """Return the trained ids, unshifted, and IGNORED elsewhere."""
    return [i if trained else IGNORED for i, trained in zip(document["ids"], document["trained"], strict=True)]


def minisft(job: SimpleNamespace, turn: Turn, *, compiled: bool = False, dtype: str = "float32") -> None:
    """The steps of `training.loop`, without evaluation, checkpoints and log."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import numpy as np
    import torch

    from minisft import config_io
    from minisft.config import Config, OptimConfig, ParallelConfig, TrainConfig
    from minisft.data.batches import micro_batch
    from minisft.model import weights
    from minisft.model.llama_config import read_config
    from minisft.runs.assemble import open_optimizer
    from minisft.training import parallel
    from minisft.training.loss import batch_loss

    def stream(packs: list[list[dict]]):
        documents = [(np.array(d["ids"]), np.array(d["trained"])) for pack in packs for d in pack]
        return micro_batch(SimpleNamespace(document=documents.__getitem__, lengths=documents),
                           list(range(len(documents))), size=size if compiled else 1, longest=config.data.seq_len)

    config = config_io.load(job.arguments)
    world = parallel.start()
    compiled = compiled or world.device.type == "cuda"  # as parallel.compile = "auto" has it
    kept = "bf16" if dtype == "bfloat16" else "fp32"
    settings = Config(train=TrainConfig(precision=job.precision),
                      optim=OptimConfig(betas=BETAS, eps=EPS, parameters=kept, moments=kept),
                      parallel=ParallelConfig(compile="true" if compiled else "false"))
    model = parallel.build_model(read_config(job.model), world, settings)
    size = config.data.seq_len * job.micro_packs
    optimizer = open_optimizer(model, settings, world)
    weights.load(model, weights.SafetensorsFolder(job.model))
    for index, packs in enumerate(job.steps):
        turn.begin()
        optimizer.begin(job.lr, index)
        targets = sum(sum(d["trained"]) for pack in packs for d in pack)
        total = torch.zeros((), device=world.device)
        for batch in map(stream, in_micro_batches(packs, job)):
            loss = batch_loss(model, batch, device=world.device, denominator=targets, compiled=compiled)
            loss.backward()
            total += loss.detach()
        optimizer.clip(CLIP)
        optimizer.step()
        turn.end(total.item())


def trl(job: SimpleNamespace, turn: Turn, *, compiled: bool = False, dtype: str = "float32", liger: bool = False,
        attention: str = "sdpa") -> None:
    """Run SFTTrainer on the packs of the job, in the form that its own packer produces."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    class Steps(SFTTrainer):
        last_loss = 0.0

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.last_loss += loss
            return loss

    class Waits(transformers.TrainerCallback):
        """A step starts when the one before ends, so collating the batch is part of it."""

        def on_train_begin(self, *_, **__):
            turn.begin()

        def on_step_end(self, args, state, control, **_):
            turn.end(trainer.last_loss.item())
            trainer.last_loss = 0.0
            if state.global_step < state.max_steps:
                turn.begin()

    datasets.disable_progress_bars()
    rows = [{"input_ids": [i for d in pack for i in d["ids"]], "labels": [i for d in pack for i in labels(d)],
             "seq_lengths": [len(d["ids"]) for d in pack]} for packs in job.steps for pack in packs]
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=job.folder), max_steps=len(job.steps), packing=True, packing_strategy="bfd",
        per_device_train_batch_size=job.micro_packs,
        gradient_accumulation_steps=len(job.steps[0]) // job.micro_packs, dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential", max_length=job.seq_len, learning_rate=job.lr,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=0.0,
        max_grad_norm=CLIP, gradient_checkpointing=False, bf16=job.precision == "bf16",
        use_cpu=device().type == "cpu", use_liger_kernel=liger, torch_compile=compiled,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        model_init_kwargs={"dtype": dtype, "attn_implementation": attention})
    trainer = Steps(model=job.model, args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Waits()],
                    processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(job.model))
    trainer.train()


def transformers(job: SimpleNamespace, turn: Turn) -> None:
    """Run LlamaForCausalLM: packs as rows, documents marked by positions that restart, all logits at once."""
    os.environ.update(HF_HUB_OFFLINE="1")
    import torch
    from transformers import LlamaForCausalLM

    on = device()
    model = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa").to(on)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    for packs in job.steps:
        turn.begin()
        trained, total = sum(sum(d["trained"]) for pack in packs for d in pack), torch.zeros((), device=on)
        for together in in_micro_batches(packs, job):
            rows = [([i for d in pack for i in d["ids"]], [i for d in pack for i in labels(d)],
                     [i for d in pack for i in range(len(d["ids"]))]) for pack in together]
            longest = max(len(ids) for ids, _, _ in rows)
            ids, targets, positions = (
                torch.tensor([row[i] + (longest - len(row[i])) * [fill] for row in rows], device=on)
                for i, fill in enumerate((0, IGNORED, 0)))
            with torch.autocast(on.type, torch.bfloat16, enabled=job.precision == "bf16"):
                loss = model(input_ids=ids, position_ids=positions, labels=targets, num_items_in_batch=trained,
                             use_cache=False).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn.end(total.item())


def torchtune(job: SimpleNamespace, turn: Turn, *, compiled: bool = False) -> None:
    """Run its Llama-3.2 (tied) or Llama-3 builder, checkpointer, packed data set and chunked loss; fused AdamW."""
    import torch
    from torchtune import training
    from torchtune.data import padded_collate_packed
    from torchtune.datasets import PackedDataset
    from torchtune.models.llama3 import llama3
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    shape = llama_shape(job)
    files = sorted(file.name for file in Path(job.model).glob("*.safetensors"))
    tied = shape.get("tie_word_embeddings", False)
    checkpointer = training.FullModelHFCheckpointer(job.model, files, "LLAMA3_2" if tied else "LLAMA3",
                                                    tempfile.mkdtemp(dir=job.folder))
    options = {"vocab_size": shape["vocab_size"], "num_layers": shape["num_hidden_layers"],
               "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"],
               "embed_dim": shape["hidden_size"], "max_seq_len": job.seq_len, "norm_eps": shape["rms_norm_eps"],
               "intermediate_dim": shape["intermediate_size"], "rope_base": int(shape["rope_theta"])}
    with training.set_default_dtype(torch.bfloat16 if job.precision == "bf16" else torch.float32):
        model = llama3_2(**options, scale_factor=1) if tied else llama3(**options)
    loss_of = CEWithChunkedOutputLoss()
    if compiled:
        training.compile_model(model, verbose=False)
        training.compile_loss(loss_of, verbose=False)
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])
    model.to(device())
    model.set_num_output_chunks(loss_of.num_output_chunks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    for packs in job.steps:
        documents = [[{"tokens": d["ids"], "labels": labels(d)} for d in pack] for pack in packs]
        rows = [PackedDataset(pack, max_seq_len=job.seq_len)[0] for pack in documents]  # packed before training starts
        turn.begin()
        trained, total = 0, torch.zeros((), device=device())
        for together in in_micro_batches(rows, job):
            batch = {name: value.to(device()) for name, value in padded_collate_packed(together).items()}
            targets = batch.pop("labels")
            targets = torch.hstack((targets[:, 1:], targets.new_full((len(targets), 1), IGNORED)))
            count = (targets != IGNORED).sum()
            loss = loss_of(model(**batch), targets) * count
            loss.backward()
            trained, total = trained + count, total + loss.detach()
        training.scale_grads(model, 1 / trained)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn.end((total / trained).item())


def litgpt(job: SimpleNamespace, turn: Turn, *, micro_batch: int = 0) -> None:
    """Run its GPT (the head is never tied), collation and chunked loss under Lightning's Fabric; it does not clip."""
    import lightning
    import torch
    from litgpt import GPT, Config
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = llama_shape(job)
    config = Config(name="peer", block_size=job.seq_len, n_layer=shape["num_hidden_layers"],
                    n_embd=shape["hidden_size"], n_head=shape["num_attention_heads"],
                    n_query_groups=shape["num_key_value_heads"], head_size=shape["head_dim"],
                    vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], bias=False,
                    parallel_residual=False, rotary_percentage=1.0, norm_class_name="RMSNorm",
                    norm_eps=shape["rms_norm_eps"], mlp_class_name="LLaMAMLP",
                    intermediate_size=shape["intermediate_size"], rope_base=int(shape["rope_theta"]))
    fabric = lightning.Fabric(devices=1, accelerator=device().type,
                              precision="bf16-mixed" if job.precision == "bf16" else "32-true")
    state, halves = {}, {}
    for file in sorted(Path(job.model).glob("*.safetensors")):
        copy_weights_hf_llama(config, halves, state, load_file(file), dtype=torch.float32)
    with fabric.init_module():
        model = GPT(config)
    model.load_state_dict(state)
    del state
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=job.lr, betas=BETAS, eps=EPS,
                                                          weight_decay=0.0, fused=True))
    collate, counts = get_sft_collate_fn(), {"raw": 0, "raw_plus_prompt_template": 0}
    model.train()
    for packs in job.steps:
        documents = [{"input_ids": torch.tensor(d["ids"]), "labels": torch.tensor(labels(d)), "token_counts": counts}
                     for pack in packs for d in pack]
        turn.begin()
        size, total = micro_batch or len(documents), 0.0
        batches = [fabric.to_device(collate(documents[i : i + size])) for i in range(0, len(documents), size)]
        for i, batch in enumerate(batches):
            with fabric.no_backward_sync(model, enabled=i + 1 < len(batches)) if len(batches) > 1 else nullcontext():
                logits = model(batch["input_ids"])
                loss = chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:]) / len(batches)
                fabric.backward(loss)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        turn.end(total)


def llama_shape(job: SimpleNamespace) -> dict:
    """Read config.json for the systems that take a shape instead of a folder."""
    shape = json.loads((Path(job.model) / "config.json").read_text())
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise SystemExit("error: this benchmark builds this system's network without rope scaling, and "
                         f"{job.model}/config.json asks for {rope['rope_type']!r}")
    theta = shape.get("rope_theta") or rope["rope_theta"]
    return {"head_dim": shape["hidden_size"] // shape["num_attention_heads"], **shape, "rope_theta": theta}


SYSTEMS = {
    "minisft": minisft,
    "minisft-compile": lambda job, turn: minisft(job, turn, compiled=True),
    "minisft-bf16-weights": lambda job, turn: minisft(job, turn, dtype="bfloat16"),
    "trl": trl,
    "trl-compile": lambda job, turn: trl(job, turn, compiled=True),
    "trl-bf16-weights": lambda job, turn: trl(job, turn, dtype="bfloat16"),
    "trl-liger": lambda job, turn: trl(job, turn, liger=True),
    "trl-flash": lambda job, turn: trl(job, turn, attention="flash_attention_2"),
    "transformers": transformers,
    "torchtune": torchtune,
    "torchtune-compile": lambda job, turn: torchtune(job, turn, compiled=True),
    "litgpt": litgpt,
    "litgpt-single": lambda job, turn: litgpt(job, turn, micro_batch=1),
}


def main() -> None:
    """Run a system's steps; output of libraries goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("job", type=Path)
    options = parser.parse_args()
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, kill this and no other program
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = SimpleNamespace(**json.loads(options.job.read_text()))
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    SYSTEMS[options.system](job, Turn(out))


if __name__ == "__main__":
    main()
