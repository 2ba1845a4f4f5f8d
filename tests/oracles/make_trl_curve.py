"""Ten steps of TRL's SFTTrainer on the tiny Llama, written down as the curve that minisft has to follow.

    pip install trl==1.16.0 transformers==5.23.0
    python tests/oracles/make_trl_curve.py     # writes trl_curve.json beside this file; one minute on one core

Every step sees all 32 conversations, so neither shuffling nor packing order has a say, and what is left to compare is
the mask, the loss denominator, the network and the optimizer. TRL runs three times: all conversations in one padded
batch, in four accumulated batches of eight, and packed (`bfd`) into streams. TRL sums token losses and divides by the
trained tokens of the whole step, so the three must agree. A loop without any trainer, one document at a time, must
agree with them too, or nothing is written: a fixture that only TRL can reproduce would be no oracle.

The token ids and the trained positions come from transformers' `apply_chat_template` with TRL's bundled Llama-3
training template: content and <|eot_id|> of the assistant are trained, headers are not, contents are trimmed.
"""

import os

# Before torch and the Hugging Face libraries are imported: one thread for a fixed order of sums, and no network.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import hashlib
import json
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl
from conversations import CONVERSATIONS
from tiny_llama import tiny_weights, write_tiny_llama
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

CURVE = Path(__file__).with_name("trl_curve.json")
TOLERANCE = 1e-4
STEPS, LR, BETAS, EPS, CLIP = 12, 1e-3, (0.9, 0.95), 1e-8, 1.0
MAX_LENGTH = 1024
RUNS = {
    "full_batch": {"per_device_train_batch_size": 32},
    "accumulated": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "packed": {"per_device_train_batch_size": 32, "packing": True, "packing_strategy": "bfd"},
}


class Recorder(TrainerCallback):
    """Keeps what TRL logs, as it logs it: one loss and one gradient norm (before clipping) a step."""

    def __init__(self) -> None:
        self.curve = {"losses": [], "grad_norms": []}

    def on_log(self, args, state, control, logs=None, **rest) -> None:
        if "loss" in logs:
            self.curve["losses"].append(logs["loss"])
            self.curve["grad_norms"].append(logs["grad_norm"])


def load_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def trl_curve(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict], batching: dict) -> dict:
    """The curve of one SFTTrainer run; `batching` says how the 32 conversations of a step reach the model."""
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **batching,
    )
    recorder = Recorder()
    trainer = SFTTrainer(
        model=load_model(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()
    assert trainer.state.epoch == STEPS, "a step that is not one epoch did not see all conversations"
    return recorder.curve


def naive_curve(folder: Path, documents: list[dict]) -> dict:
    """The same training without a trainer: no batch, no padding, no packing, one document at a time."""
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    target_tokens = sum(sum(document["trained"]) for document in documents)
    losses, grad_norms = [], []
    for _ in range(STEPS):
        loss = 0.0
        for document in documents:
            ids, trained = torch.tensor(document["ids"]), torch.tensor(document["trained"]).bool()
            logits = model(ids[None], use_cache=False).logits[0]
            loss_sum = cross_entropy(logits[:-1][trained[1:]], ids[1:][trained[1:]], reduction="sum")
            (loss_sum / target_tokens).backward()
            loss += loss_sum.item() / target_tokens
        losses.append(loss)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "grad_norms": grad_norms}


def render(tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> list[dict]:
    """One {"ids", "trained"} a conversation, as transformers renders it with TRL's training template."""
    documents = []
    for row in rows:
        rendered = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=get_training_chat_template(tokenizer),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        documents.append({"ids": rendered["input_ids"], "trained": rendered["assistant_masks"]})
    return documents


def largest_difference(one: dict, other: dict) -> float:
    pairs = zip(one["losses"] + one["grad_norms"], other["losses"] + other["grad_norms"], strict=True)
    return max(abs(left - right) for left, right in pairs)


def weights_sha256() -> str:
    """Tells a curve that moved from weights that moved, should a later NumPy draw other numbers."""
    weights = tiny_weights()
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()


def make_curve(folder: Path) -> dict:
    write_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # TRL knows Llama-3's own template and puts its training twin in its place; both are read from the installed TRL.
    template = Path(trl.__file__).parent / "chat_templates" / "llama3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    documents = render(tokenizer, rows)
    curves = {name: trl_curve(folder, tokenizer, rows, batching) for name, batching in RUNS.items()}
    curves["naive"] = naive_curve(folder, documents)
    differences = {name: largest_difference(curve, curves["full_batch"]) for name, curve in curves.items()}
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the curves differ by more than {TOLERANCE}: {differences}; {CURVE.name} is left as it was")
    return {
        "versions": {library.__name__: library.__version__ for library in (trl, transformers, torch)},
        "settings": {
            "steps": STEPS,
            "lr": LR,
            "betas": BETAS,
            "eps": EPS,
            "clip_norm": CLIP,
            "weight_decay": 0.0,
            "schedule": "constant",
            "precision": "fp32",
            "max_length": MAX_LENGTH,
            "model_seed": 0,
        },
        "weights_sha256": weights_sha256(),
        "target_tokens": sum(sum(document["trained"]) for document in documents),
        "largest_difference_from_full_batch": differences,
        "curves": curves,
        "documents": documents,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        curve = make_curve(Path(scratch) / "tiny-llama")
    # One line a key and a document, so that a change shows in a diff.
    documents = ",\n".join(json.dumps(document) for document in curve.pop("documents"))
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in curve.items())
    CURVE.write_text(f'{{\n{head},\n"documents": [\n{documents}\n]\n}}\n')
    print(json.dumps(curve, indent=1))
