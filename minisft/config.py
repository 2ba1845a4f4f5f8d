"""The configuration of a run: a TOML recipe, overridden key by key on the command line.

    train.py my.toml --optim.lr 1e-5 --data.train a.jsonl,b.jsonl

Every key is declared once, below, as a field of a frozen dataclass: type, default, one-line doc, choices and bounds.
Help, conversion, validation and the comments of the saved `config.toml` derive from that declaration, so adding a key
is adding a line. `load` reports every problem at once, each with the place it came from: a run that waits in a queue
should not fail three times for three typing errors. A recipe is data: nothing in it is ever executed.

Some defaults depend on other keys (`model.tokenizer` on `model.path`, a source's format on `data.format`). `load` fills
them in, so that readers need no rule of their own; `to_toml` leaves them out again, so that overriding `data.template`
of a saved configuration reaches the sources that had inherited it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.given import in_recipe, on_command_line, shipped_recipes
from minisft.keys import FORMATS, Source, accepted, key, to_toml, typed


@dataclass(frozen=True)
class ModelConfig:
    """The network to start from."""
    path: str = key("", "Hugging Face folder of the base model")
    init: str = key("", "the weights; empty: pretrained if model.path is given", choices=("pretrained", "random"))
    config: str = key("", "for random weights: a config.json, or a preset such as llama-3.1-8b")
    tokenizer: str = key("", "folder or tokenizer.json; empty: model.path")
    format: str = key("hf", "hf: safetensors; meta: consolidated.*.pth, read with weights_only=True",
                      choices=("hf", "meta"))


@dataclass(frozen=True)
class DataConfig:
    """From files to packs of tokens."""
    train: tuple[Source, ...] = key((), "files to train on")
    eval: tuple[Source, ...] = key((), "held-out files")
    eval_fraction: float = key(0.0, "share of the training documents held out for evaluation, chosen by their text",
                               low=0, below=1)
    general: tuple[Source, ...] = key((), "held-out general text, whose loss tells what the model forgets")
    replay: tuple[Source, ...] = key((), "general text (or chats) mixed in against forgetting")
    replay_ratio: float = key(0.05, "share of an epoch's tokens that is data.replay, repeated or sampled to that end",
                              above=0, below=1)
    format: str = key("auto", "how the files are laid out", choices=FORMATS)
    template: str = key("", "chat template; empty: the one the model folder tells")
    templates: str = key("", "TOML file with templates of your own")
    train_on: str = key("assistant", "the tokens that are trained", choices=("assistant", "last_assistant", "all"))
    seq_len: int = key(2048, "tokens in a pack", low=2, high=2**24)
    overlong: str = key("drop", "what becomes of a document longer than seq_len", choices=("drop", "truncate", "error"))
    shuffle: bool = key(True, "shuffle the documents, anew in every epoch")
    oasst: str = key("all", "conversations taken from an OASST tree", choices=("all", "best"))
    dedup: str = key("none", "repetitions left out; near: also if case, spaces or punctuation differ; true: exact",
                     choices=("none", "exact", "near"), true="exact", false="none")
    ignore: tuple[str, ...] = key((), "fields of records to take as absent, also those that change the meaning")
    skip_bad: bool = key(False, "skip malformed records instead of stopping at them")
    max_bad: int = key(100, "with skip_bad: stop after more malformed records than this", low=0)
    cache: str = key("", "folder of tokenised data; empty: minisft in $XDG_CACHE_HOME or ~/.cache")


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
    seed: int = key(0, "seed of the weights, of the order of the data and of rounding", low=0, high=2**32 - 1)
    max_skipped: int = key(10, "steps in a row that may be NaN or infinite before the run fails", low=0)
    deterministic: bool = key(False, "the same bits in every run, also on a GPU; slower there")
    precision: str = key("bf16", "arithmetic of the network; that of its weights is optim.parameters",
                         choices=("bf16", "fp32"))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over time, and the loss."""
    lr: float = key(2e-5, "peak learning rate", low=0)
    schedule: str = key("cosine", "learning rate after warmup", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = key(100, "steps of linear warmup", low=0)
    min_lr_ratio: float = key(0.0, "final learning rate as a share of the peak", low=0, high=1)
    decay_fraction: float = key(0.1, "wsd: the share of the steps that decays", low=0, high=1)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    betas: tuple[float, float] = key((0.9, 0.95), "decay of the two moments", low=0, below=1)
    eps: float = key(1e-8, "added to the denominator of the update", above=0)
    clip_norm: float = key(1.0, "largest gradient norm; 0: no clipping", low=0)
    parameters: str = key("fp32", "fp32: master weights; bf16: none, updates and gradients in bf16, rounded by chance",
                          choices=("fp32", "bf16"))
    moments: str = key("fp32", "precision of AdamW's two moments; bf16: rounded by chance", choices=("fp32", "bf16"))
    in_backward: bool = key(False, "update each parameter as soon as its gradient is there, and free the gradient")
    label_smoothing: float = key(0.0, "probability spread over the whole vocabulary", low=0, below=1)
    z_loss: float = key(0.0, "weight of the squared log-partition penalty", low=0)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters instead of full fine-tuning: the base is frozen, thin matrices beside its own are trained."""
    rank: int = key(0, "rank of the adapters; 0: full fine-tuning", low=0, high=2**16)
    alpha: float = key(16.0, "their product is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = key(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                                   "matrices with an adapter, by patterns such as layers.*.mlp.*")
    dropout: float = key(0.0, "share of the adapters' inputs that is dropped", low=0, below=1)
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead")
    dora: bool = key(False, "train the lengths of the adapted rows, too")
    base: str = key("bf16", "how the frozen weights are kept; nf4: 4 bits (QLoRA)", choices=("bf16", "fp32", "nf4"))


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving the run, and going on from what was saved."""
    every: int = key(200, "steps between checkpoints; 0: only the last step, or when asked to stop", low=0)
    keep: int = key(2, "newest checkpoints that are kept; 0: all", low=0)
    export_every: int = key(0, "steps between Hugging Face folders along the way; 0: only the final one", low=0)
    resume: str = key("auto", "auto: from the newest intact checkpoint; never; or a checkpoint's folder")
    allow_change: bool = key(False, "resume although data, batch, seed or model are not what they were")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work."""
    shard: int = key(0, "FSDP: ranks a parameter is sharded over; 0: all", low=0)
    replicate: int = key(1, "HSDP: copies of the sharded model; 0: as many as parallel.shard leaves", low=0)
    timeout: float = key(1800.0, "seconds after which a hanging step ends the run, with stacks", above=0, high=10**7)
    activation_checkpointing: str = key("none", "what the backward pass computes again: nothing, what is cheap for the "
                                        "memory it took, or whole blocks", choices=("none", "selective", "full"))
    compile: str = key("auto", "compile the layers for packs of one shape; auto: on a GPU",
                       choices=("auto", "true", "false"), true="true", false="false")
    reshard: str = key("auto", "free a layer's gathered parameters between the passes; auto: with several ranks",
                       choices=("auto", "true", "false"), true="true", false="false")
    prefetch: int = key(0, "layers whose parameters are gathered ahead of their turn; 0: as FSDP sees fit", low=0)
    offload: str = key("none", "what stays in the host's memory; optimizer: AdamW's moments; parameters: weights and "
                       "gradients too, and the step is taken there", choices=("none", "optimizer", "parameters"))


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on data.eval and data.general."""
    every: int = key(0, "steps between evaluations; 0: only at the start and the end", low=0)
    samples: int = key(0, "questions of each data.eval answered, into the log, at the start and the end", low=0)
    forgetting_bound: float = key(0.1, "warn where the loss on data.general is more nats a token above the base "
                                  "model's than this; 0: never", low=0)


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""
    dir: str = key("", "run folder; empty: runs/ and the recipe's name")
    export: bool = key(True, "write final/ at the end; false: for benchmarks and sweeps")
    profile: bool = key(False, "record a few steps and write where their time goes; --profile is short for it")


@dataclass(frozen=True)
class Config:
    """The whole configuration. Only `load` checks it and fills in the dependent defaults."""
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

    def to_toml(self) -> str:
        """The configuration as a recipe: `load` of the file gives an equal Config."""
        lines = ["# The effective configuration. Relative paths start at the folder the run was started in."]
        written = _without_inherited(self)
        for section, cls in SECTIONS.items():
            lines += ["", f"[{section}]  # {cls.__doc__}"]
            for spec in fields(cls):
                first, *rest = to_toml(getattr(getattr(written, section), spec.name)).split("\n")
                lines += [f"{spec.name} = {first}  # {spec.metadata['doc']} [{accepted(spec)}]", *rest]
        return "\n".join(lines) + "\n"


SECTIONS: dict[str, type[Any]] = {section.name: type(section.default) for section in fields(Config)}
KEYS = {f"{section}.{spec.name}": spec for section, cls in SECTIONS.items() for spec in fields(cls)}


def heldout_name(source: Source) -> str:
    """The name under which the held-out part of a training source is evaluated."""
    return f"heldout-{source.name}"


def problems(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """What is wrong between keys that are each fine alone: (the keys involved, the one to blame first; message)."""
    model, data, batch, optim = config.model, config.data, config.batch, config.optim
    random = model.init == "random"
    checks = [
        (not data.train, ("data.train",), "no training data; name at least one file"),
        (not (random or model.path), ("model.path", "model.init"),
         "no base model; name its folder, or set model.init to random and model.config"),
        (random and not model.config, ("model.config", "model.init"),
         "model.init is random, which needs a config.json or the name of a preset"),
        (batch.micro_packs > batch.packs, ("batch.micro_packs", "batch.packs"),
         f"{batch.micro_packs} packs per forward pass, but batch.packs is only {batch.packs} per step"),
        (batch.micro_packs * data.seq_len >= 2**31, ("batch.micro_packs", "data.seq_len"),
         f"{batch.micro_packs} packs of {data.seq_len:,} tokens per forward pass, which takes less than {2**31:,}"),
        (config.eval.every > 0 and not (data.eval or data.eval_fraction or data.general), ("eval.every", "data.eval"),
         f"evaluation every {config.eval.every} steps, but neither data.eval nor data.general names a file"),
        (config.eval.samples > 0 and not data.eval and not data.eval_fraction, ("eval.samples", "data.eval"),
         f"{config.eval.samples} questions of each file are to be answered, but data.eval names no file"),
        (config.eval.forgetting_bound not in (0, EvalConfig.forgetting_bound) and not data.general,
         ("eval.forgetting_bound", "data.general"), f"a bound of {config.eval.forgetting_bound:g} nats on what is "
         "forgotten, but data.general names no file to measure it on"),
        (data.replay_ratio != DataConfig.replay_ratio and not data.replay, ("data.replay_ratio", "data.replay"),
         f"{data.replay_ratio:g} of the tokens should be replayed text, but data.replay names no file"),
        (optim.parameters == "bf16" and config.train.precision == "fp32", ("optim.parameters", "train.precision"),
         "parameters in bf16 cannot be computed with in fp32; set train.precision to bf16"),
        (optim.in_backward and optim.clip_norm > 0, ("optim.in_backward", "optim.clip_norm"),
         "the norm of the gradient is known only when every parameter has been updated; set optim.clip_norm to 0"),
        (config.lora != LoraConfig() and not config.lora.rank, ("lora.rank",),
         "is 0, so the other keys of [lora] do nothing; set it to 8, say"),
        (config.lora.rank > 0 and random, ("lora.rank", "model.init"),
         "adapters change what a pretrained model does; random weights are trained in full"),
        (config.lora.base == "nf4" and config.parallel.offload == "parameters", ("lora.base", "parallel.offload"),
         "a base in 4 bits stays on the device; set parallel.offload to none or optimizer"),
        (config.parallel.offload == "parameters" and (config.lora.dropout > 0 or config.lora.dora),
         ("parallel.offload", "lora.dropout", "lora.dora"),
         "dropout and DoRA keep tensors on the device; set parallel.offload to none or optimizer"),
        (optim.in_backward and config.parallel.offload == "parameters", ("optim.in_backward", "parallel.offload"),
         "gradients reach the host only after the backward pass; offload the optimizer, or update after it"),
    ]
    return [(keys, message) for wrong, keys, message in (*checks, *_name_checks(data)) if wrong]


def _name_checks(data: DataConfig) -> Iterator[tuple[bool, tuple[str, ...], str]]:
    """Whether a source has no path, or the name of another beside which it is reported."""
    held_out = [replace(source, name=heldout_name(source)) for source in data.train if data.eval_fraction]
    beside: dict[str, tuple[Sequence[Source], Sequence[Source]]] = {
        "data.train": (data.train, ()), "data.eval": (data.eval, held_out),
        "data.general": (data.general, (*data.eval, *held_out)), "data.replay": (data.replay, data.train)}
    for name, (sources, others) in beside.items():
        names, taken = [source.name for source in sources], [source.name for source in others]
        twice = sorted({n for n in names if (names + taken).count(n) > 1})
        yield any(not source.path for source in sources), (name,), "a path is empty"
        yield bool(twice), (name,), f"several sources are named {', '.join(twice)}; names must differ"


def load(argv: list[str]) -> Config:
    """The configuration of `[RECIPE] [--section.key value ...]`, checked and with dependent defaults filled in.

    UserError lists all problems, one a line. -h or --help prints the help and exits.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text())
        raise SystemExit(0)
    recipe, overrides, wrong = on_command_line(argv, KEYS)
    label, given, unreadable = in_recipe(recipe, KEYS)
    wrong = unreadable + wrong
    origin: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    bad = set()
    for where, name, value in (given or []) + overrides:
        section, _, leaf = name.partition(".")
        values[section][leaf], found = typed(where, value, KEYS[name])
        origin[name] = where
        wrong += found
        if found:
            del values[section][leaf]
            bad.add(name)
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    config = _with_inherited(config, run_name=Path(recipe).stem)
    for names, message in [] if given is None else problems(config):
        if not bad & set(names):
            where = next((origin[name] for name in names if name in origin), f"{label}: {names[0]}")
            about = "" if where.endswith(names[0]) else f"{names[0]}: "
            wrong.append(f"{where}: {about}{message}")
    if wrong:
        raise UserError("\n  ".join([f"the configuration has {len(wrong)} problem{'s' * (len(wrong) > 1)}:", *wrong]))
    return config


def help_text() -> str:
    """Usage, the shipped recipes, and every key with default, doc and what it accepts."""
    lines = [
        "usage: train.py [RECIPE] [--section.key value | --section.key=value ...]",
        "",
        "RECIPE is a TOML file or the name of a shipped recipe; none means demo.",
        f"Shipped recipes: {', '.join(shipped_recipes())}",
        "Relative paths, in a recipe too, start at the current directory.",
        "In a recipe, sources are paths or tables {" + ", ".join(spec.name for spec in fields(Source)) + "}.",
        'On the command line they are paths with commas between them ("" for none); a pair is 0.9,0.95.',
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}: {cls.__doc__}"]
        for spec in fields(cls):
            default = to_toml(spec.default).strip('[]"').replace('", "', ",")
            lines.append(f"{f'  --{section}.{spec.name} = {default}':<42}  {spec.metadata['doc']} [{accepted(spec)}]")
    return "\n".join(lines)


def _default_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minisft")


def _named(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Sources without a name get the file's, made unique: a.jsonl, b/a.json.gz -> a, a-2."""
    taken, named = {source.name for source in sources}, []
    for source in sources:
        stem = Path(source.path).name.lstrip(".").split(".")[0] or "data"
        name = source.name or next(n for n in chain([stem], (f"{stem}-{i}" for i in count(2))) if n not in taken)
        taken.add(name)
        named.append(replace(source, name=name))
    return tuple(named)


def _with_inherited(config: Config, *, run_name: str) -> Config:
    model, data = config.model, config.data

    def filled(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return _named(tuple(replace(source, format=source.format or data.format,
                                    template=source.template or data.template) for source in sources))

    trained, held = filled(data.train + data.replay), filled(data.eval + data.general)  # together: names that differ
    return replace(
        config,
        model=replace(model, init=model.init or ("pretrained" if model.path else ""),
                      tokenizer=model.tokenizer or model.path),
        data=replace(data, train=trained[: len(data.train)], replay=trained[len(data.train) :],
                     eval=held[: len(data.eval)], general=held[len(data.eval) :], cache=data.cache or _default_cache()),
        run=replace(config.run, dir=config.run.dir or f"runs/{run_name}"))


def _without_inherited(config: Config) -> Config:
    """The inverse, but for the run folder and model.init, which a saved configuration states."""
    model, data = config.model, config.data

    def own(value: str, inherited: str) -> str:
        return "" if value == inherited else value

    def stripped(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(replace(source, format=own(source.format, data.format),
                             template=own(source.template, data.template)) for source in sources)

    return replace(
        config, model=replace(model, tokenizer=own(model.tokenizer, model.path)),
        data=replace(data, train=stripped(data.train), replay=stripped(data.replay),
                     eval=stripped(data.eval), general=stripped(data.general), cache=own(data.cache, _default_cache())))
