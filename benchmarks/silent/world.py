"""What every exhibit shares: a tiny Llama with a tokenizer of its own, conversations, and the words of a verdict.

Nothing is downloaded. The tokenizer is trained on the sentences below with Llama-3's rules (its regular expression, its
special tokens, a post-processor that puts `<|begin_of_text|>` first); the network has two layers and random weights
from a fixed seed, large enough that each fault shows. `World.model` writes a Hugging Face folder of it:

    base          untied head, fp32
    tied          tie_word_embeddings, no lm_head in the file
    tied_own      tie_word_embeddings, and an lm_head in the file that is not the embedding
    pad_is_eos    the padding token is the stop token, which is how most scripts set it
    bf16          weights in bf16, as bases are published
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, PAD, STOP = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL = (BEGIN, END, PAD, HEADER, HEADER_END, STOP)
IGNORED = -100  # the label of a token that is not trained

# The chat template as Meta released it with Llama-3-Instruct.
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

WORDS = (
    "river", "stone", "lantern", "copper", "meadow", "ladder", "window", "thunder", "garden", "kettle", "harbour",
    "feather", "mountain", "ribbon", "orchard", "candle", "anchor", "pebble", "saddle", "blanket", "compass",
    "needle", "barrel", "cottage", "shadow", "bridge", "valley", "hammer", "basket", "mirror")
SENTENCES = (
    "What lies behind the old harbour?", "A row of boats, and one of them is red.", "Who mends the lantern at night?",
    "The keeper does, with copper wire and patience.", "How many steps has the ladder?", "Nineteen, and one is broken.",
    "Please name a colour.", "Green.", "Why does the kettle sing?", "Because the steam is in a hurry to leave.",
    "Is the bridge open?", "Yes.", "Tell me about the mountain.", "Answer:", "Question:", "system", "user", "assistant",
    *(f"The {word} is near the {other}." for word, other in zip(WORDS, WORDS[7:] + WORDS[:7], strict=True)))


class CannotError(Exception):
    """The trainer refused, or offers no way to do what the exhibit asks for; the text says which."""


class NotApplicableError(Exception):
    """The exhibit asks about something that this trainer does not have by design."""


@dataclass(frozen=True)
class Verdict:
    """What came out of an exhibit for a trainer."""

    state: str  # right, wrong, warned, cannot, not applicable
    text: str  # the finding, with its figure
    size: float | None = None  # how far off, in the exhibit's unit; NaN where the trainer's figure is not finite

    def __post_init__(self):
        assert self.state in ("right", "wrong", "warned", "cannot", "not applicable"), self.state


def judged(size: float, text: str, *, limit: float = 0.0) -> Verdict:
    """Right if `size` is at most `limit`. NaN is wrong."""
    return Verdict("right" if size <= limit else "wrong", text, size)


@dataclass(frozen=True)
class Row:
    """A row that would be trained on. Labels are not shifted: where a token is trained, its label is the token."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Job:
    """A training run, in words that every trainer knows. A rank's step is `accumulate` batches of `rows` rows."""

    data: tuple[dict | str, ...]  # {"messages": [...]} or {"prompt": ..., "completion": ...}; text: a line as it stands
    model: str = "base"
    held_out: tuple[dict, ...] = ()
    length: int = 76  # the most tokens of a row; one conversation of most exhibits fits, and two do not
    packing: bool = False  # may several conversations share a row?
    rows: int = 1
    accumulate: int = 1
    ranks: int = 1
    steps: int | None = 1  # None: one epoch
    lr: float = 1.0  # constant, no warm-up
    eps: float = 1.0  # of AdamW; with eps as large as this, the first update tells the gradient (oracle.gradient_told)
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    precision: str = "fp32"
    shuffle: bool = False
    stop: int = 0  # save after this step and stop; then resume in a new process or trainer


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    losses: list[float]  # of each step, as the trainer reports them
    held_out: list[float]  # the held-out loss before and after, as the trainer reports it; empty without held_out
    folder: Path  # the exported model


class Trainer:
    """What an adapter provides. `name` is the column's."""

    name = ""
    about = ""  # the configuration, in one line
    versions = ""
    jobs = 1  # exhibits that may run at a time, each in a process of its own
    own_format = False  # conversations in another format than Llama-3's: its rows are then taken as they are

    def rows(self, job: Job, world: "World") -> list[Row]:
        """The rows that `job` would train on, one conversation each, in the data's order."""
        raise CannotError("rows are not shown")

    def train(self, job: Job, world: "World") -> Run:
        """Train `job`."""
        raise CannotError("no training")

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each step, as a share of `Job.lr`, where a constant one cannot be asked for."""
        return [1.0] * steps


def said(question: str, answer: str, **fields: object) -> dict:
    """A conversation of two turns; `fields` belong to the answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]}


def words(count: int, start: int = 0) -> str:
    """A text of `count` words, which are a token each."""
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


class World:
    """The folder with the models, and one for each run."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        self.tokenizer = make_tokenizer()

    def run_folder(self) -> Path:
        """An empty folder."""
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        folder.mkdir(parents=True)
        return folder

    def write(self, records: tuple[dict | str, ...], name: str = "data") -> Path:
        """A JSONL of `records`, named after its content."""
        text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
        path = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        path.write_text(text)
        return path

    def model(self, name: str = "base") -> Path:
        """The Hugging Face folder of a model."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir(parents=True)
            write_model(folder, self.tokenizer, name)
        return folder


@cache
def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of some 500 tokens that behaves as Llama-3's does."""
    tokenizer = Tokenizer(models.BPE())
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(llama3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                  use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    text = [sentence + "\n\n" for sentence in SENTENCES] + [" ".join(WORDS) + "\n\n\n"] * 5
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B",
                                      special_tokens=[(BEGIN, begin)])])
    return tokenizer


def make_config(tokenizer: Tokenizer, name: str) -> dict:
    """config.json"""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "max_position_embeddings": 4096, "initializer_range": 0.02, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": name.startswith("tied"), "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(STOP), "torch_dtype": "bfloat16" if name == "bf16" else "float32"}


def make_weights(config: dict, name: str) -> dict[str, torch.Tensor]:
    """Random weights from a fixed seed, under Hugging Face's names."""
    draw = torch.Generator().manual_seed(20)
    width, inner, words_ = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * gain / math.sqrt(columns)

    weights = {"model.embed_tokens.weight": torch.randn(words_, width, generator=draw) * 0.5}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for part, rows, columns, gain in (("q", queries, width, 2.0), ("k", keys, width, 2.0), ("v", keys, width, 1.0),
                                          ("o", width, queries, 1.0)):
            weights[f"{layer}self_attn.{part}_proj.weight"] = matrix(rows, columns, gain)
        for part, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            weights[f"{layer}mlp.{part}_proj.weight"] = matrix(rows, columns)
        for norm in ("input", "post_attention"):
            weights[f"{layer}{norm}_layernorm.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
    weights["model.norm.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
    head = matrix(words_, width)
    if name != "tied":
        weights["lm_head.weight"] = head
    return {key: value.bfloat16() if name == "bf16" else value for key, value in weights.items()}


def write_model(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    """A folder that transformers loads."""
    config = make_config(tokenizer, name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(make_weights(config, name), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": STOP,
        "pad_token": STOP if name == "pad_is_eos" else PAD, "model_max_length": 4096,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}))
