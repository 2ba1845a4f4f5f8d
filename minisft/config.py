"""Every key of a run's configuration, declared once: type, default, one-line doc, choices and bounds.

A section is a frozen dataclass, a key is one of its fields, and adding a key is adding a line here: config_io.py
derives help, conversion, checks and the comments of the saved `config.toml` from it. `problems` checks keys against
each other. Some defaults depend on other keys (`model.tokenizer` on `model.path`, a source's format on `data.format`);
`config_io.load` fills them in, so code that reads a configuration needs no rule of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import Any

TABLE = tuple[tuple[str, str], ...]  # what a TOML table of strings becomes: hashable, in its order
FORMATS = ("auto", "alpaca", "dolly", "sharegpt", "oasst", "messages", "prompt_completion", "text")
AUTO = ("auto", "true", "false")
FORGETTING = "forgetting"  # in eval.stop_on


def key(default: Any, doc: str, *, choices: tuple[str, ...] = (), aliases: Mapping[str, str] = MappingProxyType({}),
        **bounds: float) -> Any:
    """One key. `bounds`: low and high (inclusive), above and below (exclusive). `aliases`: other names of choices."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "aliases": aliases, "bounds": bounds})


@dataclass(frozen=True)
class Source:
    """One file of data.train, data.eval, data.general or data.replay; or a folder or a glob of several."""
    path: str = key(MISSING, "the file; a.json#train: the list named train in one JSON object")
    format: str = key("", "empty: data.format", choices=FORMATS)
    fields: tuple[tuple[str, str], ...] = key((), "empty: data.fields")
    template: str = key("", "empty: data.template")
    weight: float = key(1.0, "passes over it in an epoch; part of a pass is sampled anew", above=0, high=10**4)
    name: str = key("", "name in reports; empty: the file's name without suffixes")


@dataclass(frozen=True)
class ModelConfig:
    """The network to start from."""
    path: str = key("", "Hugging Face folder of the base model")
    init: str = key("", "empty: pretrained if model.path is set", choices=("pretrained", "random"))
    config: str = key("", "for random weights: a config.json, or a preset such as llama-3.1-8b")
    tokenizer: str = key("", "folder or tokenizer.json; empty: model.path")
    format: str = key("hf", "hf: safetensors; meta: consolidated.*.pth, weights_only=True", choices=("hf", "meta"))


@dataclass(frozen=True)
class DataConfig:
    """From files to packs of tokens."""
    train: tuple[Source, ...] = key((), "files to train on")
    eval: tuple[Source, ...] = key((), "held-out files")
    eval_fraction: float = key(0.0, "share of data.train's documents to hold out, chosen by text", low=0, below=1)
    general: tuple[Source, ...] = key((), "held-out general text; its loss shows what the model forgets")
    replay: tuple[Source, ...] = key((), "general text or chats mixed in to reduce forgetting")
    replay_ratio: float = key(0.05, "fraction of an epoch's tokens that comes from data.replay", above=0, below=1)
    format: str = key("auto", "format of the files", choices=FORMATS)
    fields: tuple[tuple[str, str], ...] = key(
        (), 'what columns are called here: {instruction = "soru", output = "cevap"}; empty: as the format has them')
    template: str = key("", "chat template; empty: the one that the model folder names")
    templates: str = key("", "TOML file with your own templates")
    train_on: str = key("assistant", "tokens to train on", choices=("assistant", "last_assistant", "all"))
    seq_len: int = key(2048, "tokens in a pack", low=2, high=2**24)
    overlong: str = key("drop", "what to do with documents longer than seq_len; split: texts into parts, drop others",
                        choices=("drop", "truncate", "split", "error"))
    shuffle: bool = key(True, "shuffle the documents anew in every epoch")
    oasst: str = key("all", "conversations to take from an OASST tree", choices=("all", "best"))
    dedup: str = key("none", "duplicates to drop; near: also if case, spaces or punctuation differ; true: exact",
                     choices=("none", "exact", "near"), aliases={"true": "exact", "false": "none"})
    ignore: tuple[str, ...] = key((), "record fields to treat as absent, even those that change a record's meaning")
    skip_bad: bool = key(False, "skip malformed records instead of stopping at them")
    max_bad: int = key(100, "with skip_bad: stop after more malformed records than this", low=0)
    cache: str = key("", "folder of tokenized data; empty: minisft in $XDG_CACHE_HOME or ~/.cache")


@dataclass(frozen=True)
class BatchConfig:
    """The size of a step."""
    packs: int = key(32, "packs per optimizer step over all ranks", low=1, high=2**24)
    micro_packs: int = key(1, "packs per rank per forward pass; accumulation is derived", low=1)


@dataclass(frozen=True)
class TrainConfig:
    """Length and arithmetic of the run."""
    epochs: int = key(3, "passes over the training data", low=1, high=10**9)
    max_steps: int | None = key(None, "stop after this many steps", low=1)
    seed: int = key(0, "seed of random weights, data order, dropout and stochastic rounding", low=0, high=2**32 - 1)
    max_skipped: int = key(10, "NaN or infinite steps in a row that the run survives", low=0)
    deterministic: bool = key(False, "the same bits in every run, also on a GPU; slower there")
    precision: str = key("bf16", "compute precision; optim.parameters is that of the weights",
                         choices=("bf16", "fp32", "fp8"))
    fp8_scale: str = key("tensor", "fp8: one scale for each tensor, or for each row of it, which loses less",
                         choices=("tensor", "row"))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate schedule, and the loss."""
    lr: float = key(2e-5, "peak learning rate", low=0)
    schedule: str = key("cosine", "learning rate after warmup", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = key(100, "steps of linear warmup", low=0)
    min_lr_ratio: float = key(0.0, "final learning rate as a fraction of the peak", low=0, high=1)
    decay_fraction: float = key(0.1, "wsd: the fraction of the steps that decays", low=0, high=1)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    betas: tuple[float, float] = key((0.9, 0.95), "decay of the two moments", low=0, below=1)
    eps: float = key(1e-8, "added to the denominator of the update", low=1e-30)
    clip_norm: float = key(1.0, "maximum gradient norm; 0: no clipping", low=0)
    parameters: str = key("fp32", "fp32: master weights; bf16: no masters, bf16 gradients, stochastic rounding",
                          choices=("fp32", "bf16"))
    moments: str = key("fp32", "precision of AdamW's moments; bf16: with stochastic rounding", choices=("fp32", "bf16"))
    in_backward: bool = key(False, "update each parameter as soon as its gradient is ready, then free the gradient")
    label_smoothing: float = key(0.0, "probability spread over all words; held-out losses have none", low=0, below=1)
    z_loss: float = key(0.0, "weight of the squared log-partition penalty; held-out losses have none", low=0)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters instead of full fine-tuning: the base is frozen, low-rank matrices beside it are trained."""
    rank: int = key(0, "rank of the adapters; 0: full fine-tuning", low=0, high=2**16)
    alpha: float = key(16.0, "the adapters' output is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = key(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                                   "matrices that get an adapter; patterns such as layers.*.mlp.* are fine")
    dropout: float = key(0.0, "dropout of the adapters' inputs", low=0, below=1)
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead")
    dora: bool = key(False, "also train the magnitudes of the adapted rows (DoRA)")
    base: str = key("bf16", "precision of the frozen weights; nf4: 4 bits (QLoRA)", choices=("bf16", "fp32", "nf4"))


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving the run, and resuming it."""
    every: int = key(200, "steps between checkpoints; 0: only at the last step, or when asked to stop", low=0)
    keep: int = key(2, "number of checkpoints to keep, the newest; 0: all", low=0)
    export_every: int = key(0, "steps between Hugging Face folders during the run; 0: only the final one", low=0)
    keep_best: str = key("", "a held-out set: the model of its lowest loss is kept in best/")
    resume: str = key("auto", "auto: from the newest intact checkpoint; never; or a checkpoint's folder")
    allow_change: bool = key(False, "resume even if data, batch, seed or model have changed")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work."""
    shard: int = key(0, "FSDP: ranks that each parameter is sharded over; 0: all", low=0)
    replicate: int = key(1, "HSDP: copies of the sharded model; 0: as many as parallel.shard allows", low=0)
    context: int = key(1, "consecutive ranks that share each pack, for documents that no GPU holds alone", low=1)
    timeout: float = key(1800.0, "seconds without progress until the run ends with its stacks", above=0, high=10**7)
    activation_checkpointing: str = key("none", "what the backward pass recomputes: cheap parts, or whole blocks",
                                        choices=("none", "selective", "full"))
    compile: str = key("auto", "compile the layers for packs of one shape; auto: on a GPU", choices=AUTO)
    reshard: str = key("auto", "free gathered parameters between the passes; auto: with several ranks", choices=AUTO)
    prefetch: int = key(0, "layers whose parameters are gathered ahead of use; 0: FSDP decides", low=0)
    offload: str = key("none", "what to keep in host memory; parameters: weights, gradients and moments, updated there",
                       choices=("none", "optimizer", "parameters"))


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on data.eval and data.general."""
    every: int = key(0, "steps between evaluations; 0: only at the start and the end", low=0)
    samples: int = key(0, "questions of each held-out set to answer in the log, at each evaluation", low=0)
    max_tokens: int = key(0, "tokens of each held-out set to evaluate on, chosen by train.seed; 0: all", low=0)
    stop_on: tuple[str, ...] = key((), "held-out sets: one without a new lowest loss in eval.patience evaluations ends "
                                   "the run; forgetting: crossing eval.forgetting_bound ends it")
    patience: int = key(3, "evaluations in a row without a new lowest loss that end it", low=1)
    forgetting_bound: float = key(0.1, "warn if data.general's loss rises by more nats a token; 0: never", low=0)


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""
    dir: str = key("", "run folder; empty: runs/ and the recipe's name, or runs/run")
    export: bool = key(True, "write final/ at the end; false: for benchmarks and sweeps")
    profile: bool = key(False, "profile a few steps and write where their time goes; short: --profile")


@dataclass(frozen=True)
class Config:
    """The whole configuration. Only `config_io.load` checks it and fills in the defaults that depend on other keys."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()


def heldout_name(source: Source) -> str:
    """The name under which the held-out part of a training source is evaluated."""
    return f"heldout-{source.name}"


def problems(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Conflicts between keys that are each fine alone: (the keys, the one to blame first; the message)."""
    model, data, batch, optim, lora = config.model, config.data, config.batch, config.optim, config.lora
    random, on_host = model.init == "random", config.parallel.offload == "parameters"
    held = bool(data.eval or data.eval_fraction)
    every, samples, bound = config.eval.every, config.eval.samples, config.eval.forgetting_bound
    best, stop_on = config.checkpoint.keep_best, config.eval.stop_on
    checks = [
        (not data.train, "data.train", "no training data; name at least one file"),
        (not (random or model.path), "model.path model.init",
         "no base model; name its folder, or set model.init to random and model.config"),
        (random and not model.config, "model.config model.init",
         "model.init is random, which needs a config.json or the name of a preset"),
        (batch.micro_packs > batch.packs, "batch.micro_packs batch.packs",
         f"{batch.micro_packs} packs per forward pass, but batch.packs is only {batch.packs} per step"),
        (batch.micro_packs * data.seq_len >= 2**31, "batch.micro_packs data.seq_len",
         f"{batch.micro_packs} packs of {data.seq_len:,} tokens per forward pass, which takes less than {2**31:,}"),
        (every > 0 and not (held or data.general), "eval.every data.eval",
         f"evaluation every {every} steps, but neither data.eval nor data.general names a file"),
        (samples > 0 and not held, "eval.samples data.eval",
         f"{samples} questions of each file to answer, but data.eval names no file"),
        (bound not in (0, EvalConfig.forgetting_bound) and not data.general, "eval.forgetting_bound data.general",
         f"a bound of {bound:g} nats on forgetting, but data.general names no file to measure it on"),
        (bool(best or stop_on) and not every, "eval.every checkpoint.keep_best eval.stop_on",
         "is 0, so no loss before the end tells checkpoint.keep_best or eval.stop_on anything; set it to 100, say"),
        (FORGETTING in stop_on and not (data.general and bound), "eval.stop_on data.general eval.forgetting_bound",
         "forgetting is measured on data.general and ends the run above eval.forgetting_bound; set both"),
        (optim.parameters == "bf16" and config.train.precision == "fp32", "optim.parameters train.precision",
         "bf16 parameters need bf16 compute; set train.precision to bf16"),
        (optim.in_backward and optim.clip_norm > 0, "optim.in_backward optim.clip_norm",
         "the gradient norm is known only after every parameter has been updated; set optim.clip_norm to 0"),
        (lora != LoraConfig() and not lora.rank, "lora.rank",
         "is 0, so the other keys of [lora] do nothing; set it to 8, say"),
        (lora.rank > 0 and random, "lora.rank model.init",
         "adapters change what a pretrained model does, and model.init is random; set lora.rank to 0"),
        (lora.base == "nf4" and config.train.precision == "fp8", "train.precision lora.base",
         "an nf4 base is unpacked to bf16 and multiplied as such; set train.precision to bf16"),
        (lora.base == "nf4" and on_host, "lora.base parallel.offload",
         "an nf4 base stays on the device; set parallel.offload to none or optimizer"),
        (on_host and (lora.dropout > 0 or lora.dora), "parallel.offload lora.dropout lora.dora",
         "dropout and DoRA keep tensors on the device; set parallel.offload to none or optimizer"),
        (optim.in_backward and on_host, "optim.in_backward parallel.offload",
         "gradients reach the host only after the backward pass; set one of the two to its default"),
    ]
    yield from ((tuple(keys.split()), message) for wrong, keys, message in checks if wrong)
    for used, keys, needs in (
            (optim.schedule == "wsd", "optim.decay_fraction optim.schedule", "optim.schedule is wsd"),
            (optim.schedule != "constant", "optim.min_lr_ratio optim.schedule", "optim.schedule lowers the rate"),
            (config.train.precision == "fp8", "train.fp8_scale train.precision", "train.precision is fp8"),
            (data.skip_bad, "data.max_bad data.skip_bad", "data.skip_bad is true"),
            (data.replay, "data.replay_ratio data.replay", "data.replay names a file"),
            (held or data.general, "eval.max_tokens data.eval", "data.eval or data.general names a file"),
            ({*stop_on} - {FORGETTING}, "eval.patience eval.stop_on", "eval.stop_on names a held-out set")):
        value, default = (attrgetter(keys.split()[0])(each) for each in (config, Config))
        if value != default and not used:
            yield tuple(keys.split()), f"{value} does nothing unless {needs}; leave it out, or say {default}"
    yield from _name_problems(data, best, stop_on)


def _name_problems(data: DataConfig, best: str, stop_on: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    names = {key: [source.name for source in getattr(data, key)] for key in ("train", "eval", "general", "replay")}
    held_out = [heldout_name(source) for source in data.train if data.eval_fraction]
    beside = {"eval": held_out, "general": names["eval"] + held_out, "replay": names["train"]}  # in the same report
    sets = [*beside["general"], *names["general"]]
    for key, wanted in (("checkpoint.keep_best", {best} - {""}), ("eval.stop_on", {*stop_on} - {FORGETTING})):
        if unknown := sorted(wanted - {*sets}):
            yield (key,), f"{', '.join(unknown)}: no held-out set has this name; there are: {', '.join(sets) or 'none'}"
    for key, own in names.items():
        if not all(source.path for source in getattr(data, key)):
            yield (f"data.{key}",), "a path is empty"
        if key in ("eval", "general") and any(source.weight != 1 for source in getattr(data, key)):
            yield (f"data.{key}",), "a weight is of passes in training, and losses are of one pass; leave it out"
        if twice := sorted({name for name in own if (own + beside.get(key, [])).count(name) > 1}):
            yield (f"data.{key}",), f"several sources are named {', '.join(twice)}; give each its own name"
