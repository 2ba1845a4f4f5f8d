"""What a run is given: keys of a recipe and of the command line, each with the place it came from, still unchecked.

    my.toml: optim.lr                 "optim.lr"      0.001
    command line: --data.train        "data.train"    ["a.jsonl", "b.jsonl"]

Values are what a recipe would hold. A recipe is data: nothing in it is ever executed.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field
from importlib import resources
from pathlib import Path
from typing import Any

from minisft.errors import PATH, printable
from minisft.keys import accepted, from_text, nearest

Keys = Mapping[str, Field[Any]]  # "section.key" -> how it is declared
Given = tuple[str, str, Any]  # where, key, value

SHORT = {"--profile": "--run.profile=true"}
LARGEST = 2**24  # bytes of a recipe
_THEIRS = """
batch.packs, over all ranks (accumulation is derived): gradient_accumulation_steps global_batch_size train_batch_size
batch.micro_packs: per_device_train_batch_size micro_batch_size batch_size
checkpoint.every: save_steps save_interval
checkpoint.keep: save_total_limit
checkpoint.resume: resume_from_checkpoint
data.eval: eval_dataset validation_file
data.eval_fraction: val_size val_set_size
data.seq_len: max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size
data.template: chat_template
data.train: dataset datasets dataset_name train_file data_path
data.train_on: train_on_inputs train_on_prompt completion_only_loss assistant_only_loss
documents are always packed, and never see each other: packing sample_packing
eval.every: eval_steps eval_interval
every step is logged: logging_steps log_interval
lora.alpha: lora_alpha
lora.base = nf4: load_in_4bit quantization_bit
lora.dropout: lora_dropout
lora.rank: lora_r lora_rank
lora.targets: lora_target lora_target_modules target_modules
minisft report --tensorboard writes event files: report_to
model.path: model_name_or_path base_model pretrained_model_name_or_path
optim.betas: adam_beta1 adam_beta2 beta1 beta2
optim.clip_norm: max_grad_norm grad_clip gradient_clip_val
optim.eps: adam_epsilon
optim.lr: learning_rate
optim.schedule: lr_scheduler_type lr_scheduler
optim.warmup_steps: warmup_ratio lr_warmup_steps num_warmup_steps
parallel.activation_checkpointing: gradient_checkpointing
parallel.compile: torch_compile
parallel.shard: fsdp deepspeed
run.dir: output_dir out_dir
torchrun --nproc-per-node starts the processes: devices num_gpus
train.epochs: num_train_epochs num_epochs max_epochs
train.precision: bf16 fp16 torch_dtype mixed_precision
train.seed: data_seed random_seed
"""
# What other programs call it -> what means it here.
THEIRS = {name: ours for ours, names in (line.split(": ") for line in _THEIRS.split("\n") if line)
          for name in names.split()}


def meant(name: str, names: Iterable[str], prefix: str = "") -> str:
    """' (here: X)' for what another program calls X, ' (did you mean X?)' for what is nearly X, or nothing."""
    theirs = THEIRS.get(name.rpartition(".")[2].replace("-", "_").lower())
    if not theirs:
        return nearest(name, names, prefix)
    return f" (here: {prefix * (theirs.partition(' ')[0].strip(',') in names)}{theirs})"


def shipped_recipes() -> dict[str, Any]:
    """Name -> file of the recipes that come with the package."""
    found = resources.files("minisft").joinpath("recipes").iterdir()
    return {entry.name.removesuffix(".toml"): entry for entry in sorted(found, key=lambda entry: entry.name)
            if entry.name.endswith(".toml")}


def on_command_line(argv: list[str], keys: Keys) -> tuple[str, list[Given], list[str]]:
    """-> recipe, what is given, problems."""
    recipe, given, wrong, left = None, {}, [], list(argv)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            if recipe is None and len(left) == len(argv) - 1:
                recipe = argument
            else:
                wrong.append(f"command line: unexpected {printable(repr(argument))}; one recipe may be named, "
                             "before the options")
            continue
        option, has_value, text = SHORT.get(argument, argument).partition("=")
        where, name = f"command line: {printable(option)}", option.removeprefix("--")
        # Also after an unknown option: its value is no second problem.
        if not has_value and left and not left[0].startswith("--"):
            has_value, text = "=", left.pop(0)
        if not option.startswith("--") or name not in keys:
            wrong.append(f"{where}: unknown option{meant(name, keys, '--')}; --help lists them all")
        elif not has_value:
            wrong.append(f"{where}: the value is missing; expected {accepted(keys[name])}")
        elif name in given:
            wrong.append(f"{where}: given twice")
        else:
            given[name] = (where, name, from_text(text, keys[name].type))
    return "demo" if recipe is None else recipe, list(given.values()), wrong


def in_recipe(recipe: str, keys: Keys) -> tuple[str, list[Given] | None, list[str]]:
    """-> label for messages, what is given or None where it could not be read at all, problems."""
    shipped = shipped_recipes()
    if Path(recipe).is_file():
        label, file = recipe, Path(recipe)
    elif recipe in shipped:
        label, file = f"shipped recipe {recipe}", shipped[recipe]
    else:
        remedy = f"give a TOML file or a shipped recipe: {', '.join(shipped)}"
        return recipe, None, [f"command line: {printable(repr(recipe), PATH)} is neither a file nor a shipped recipe; "
                              f"{remedy}"]
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        table = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad TOML, not UTF-8, nested too deep
        return label, None, [f"{label}: not a TOML file: {error}"]
    given, wrong = [], []
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    for section, content in table.items():
        if section in sections and isinstance(content, dict):
            given += [(f"{label}: {section}.{printable(leaf)}", f"{section}.{leaf}", value)
                      for leaf, value in content.items()]
        elif section in sections:
            wrong.append(f"{label}: {section}: expected a section [{section}], got {printable(repr(content))}")
        elif isinstance(content, dict):
            near = nearest(section, sections)
            wrong.append(f"{label}: {printable(section)}: unknown section{near}; sections are "
                         f"{', '.join(sections)}")
            given += [(f"{label}: {printable(section)}.{printable(leaf)}", leaf, value) for leaf, value
                      in content.items() if leaf in THEIRS]
        else:
            wrong.append(f"{label}: {printable(section)}: unknown key outside a section{meant(section, keys)}")
    wrong += [f"{where}: unknown key{meant(name, keys)}; --help lists them all"
              for where, name, _ in given if name not in keys]
    return label, [entry for entry in given if entry[1] in keys], wrong
