"""Where a trained model came from, written into its folder as `training.json`; and the model card made of it.

    minisft, commit, torch, ranks      the code that trained it, and on how many processes
    recipe, seed                       the effective configuration, as TOML
    data                               every file: its sha256, documents, tokens, trained tokens, passes per epoch
    steps, tokens, ..., losses         the result, from the run's own log; logged_steps if the log lacks some
    stopped                            why the run ended before total_steps, if eval.stop_on ended it
    history                            settings changed when the run was resumed: from_step, key, was, is
    base                               the model it began with: path, config, and the `training.json` found there

Llama-3-Instruct was trained in six rounds, each from the model of the round before (Llama Team 2024, "The Llama 3 Herd
of Models", section 4.1.6). Here the next run reads the folder that one run writes, and a folder's record holds those of
all rounds before it: record["base"]["training"]["base"]["training"] and so on.

The card is `README.md`, as model hubs show it (Mitchell et al. 2019, "Model Cards for Model Reporting"); card.md is its
template. What a run cannot know (language, licence, intended use) is left to its author. Files are named without their
folders, which are private. Names of files and of earlier models may come from others: as code they stand for
themselves, whatever Markdown or HTML they spell.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import torch

import minisft
from minisft.errors import UserError, printable
from minisft.files import read_small
from minisft.training.parallel import launched_rank

FILE = "training.json"
SOURCE = Path(__file__).parents[2]
FIGURES = ("name", "template", "sha256", "tokens", "target_tokens", "weight")  # of a source, from the data report
# The settings that the card shows.
SHOWN = re.compile(r"(batch|train|optim|lora)\..+|data\.(template|train_on|seq_len|overlong|dedup|replay_ratio)")
TEMPLATE = Path(__file__).with_name("card.md")

Record = dict[str, Any]


def start_record(base: str) -> Record:
    """The part of the record known before a run: the code, and the model in folder `base` ("": random weights).

    Raises UserError if the files there are broken: hours later would be too late to find out.
    """
    return {"minisft": minisft.__version__, "commit": commit(SOURCE), "torch": torch.__version__,
            "base": _base(Path(base)) if base else None}


def training_record(known: Record, *, data: dict[str, list[Record]], log: list[Record], step: int) -> Record:
    """The content of `training.json` after `step`.

    `known`: start_record, with ranks, recipe, seed, total_steps and history; `data`: use -> sources, as in the data
    report; `log`: the run's records.
    """
    trained = [record for record in log if record["kind"] == "train"]
    stops = [record["reason"] for record in log if record["kind"] == "stop" and record["step"] == step]
    sources = {use: [{"file": Path(source["path"]).name, "documents": source["kept"],
                      **{name: source[name] for name in FIGURES if name in source}} for source in found]
               for use, found in data.items()}
    return {**{key: value for key, value in known.items() if key != "base"}, "data": sources, "steps": step,
            **({"logged_steps": len(trained)} if len(trained) < step else {}),
            **({"stopped": stops[0]} if stops else {}),
            "skipped_steps": sum(record.get("skipped") is True for record in trained),
            **{name: sum(record[name] for record in trained) for name in ("tokens", "target_tokens", "seconds")},
            "final_loss": trained[-1]["loss"] if trained else None, "losses": _losses(log), "base": known["base"]}


def model_name(folder: Path) -> str:
    """A model folder's name for people: runs/mine/final -> mine, runs/mine/best/step-000100 -> mine-step-000100."""
    folder = folder.absolute()
    if folder.name == "final":
        return folder.parent.name or folder.name
    return f"{folder.parents[1].name}-{folder.name}" if folder.parent.name in ("exports", "best") else folder.name


def environment() -> Record:
    """Machine and versions, so that figures can be compared. Devices are this host's; `ranks` counts all hosts'."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    packages = {name: metadata.version(name) for name in ("tokenizers", "safetensors", "numpy")}
    return {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
            "commit": commit(SOURCE), "ranks": launched_rank()[1],
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda, "cpu": cpu[1].rstrip() if cpu else platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "system": platform.platform(),
            "python": platform.python_version(),
            "packages": {"minisft": minisft.__version__, "torch": torch.__version__, **packages}}


def commit(root: Path) -> str:
    """The commit of the checkout at `root`, with "-dirty" if it was changed since; "" without a repository."""
    if not (root / ".git").exists():  # or git would find that of a folder above, which belongs to another project
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def _losses(log: list[Record]) -> dict[str, Record]:
    """Name -> the first and the last held-out loss; the first is the base model's, if the log begins at step 0."""
    losses: dict[str, Record] = {}
    for record in (record for record in log if record["kind"] == "eval"):
        first = {"target_tokens": record["target_tokens"], "before": None if record["step"] else record["loss"]}
        losses.setdefault(record["name"], first).update(
            {"step": record["step"], "after": record["loss"]},
            **{name: value for name, value in record.items() if name == "forgetting"})
    return losses


def _base(folder: Path) -> Record:
    found: Record = {"name": model_name(folder), "path": str(folder)}
    config = "config.json" if (folder / "config.json").exists() else "params.json"
    for key, file in (("config", folder / config), ("training", folder / FILE)):
        try:
            if file.exists():
                found[key] = json.loads(read_small(file))
                if not isinstance(found[key], dict):
                    raise TypeError(f"expected a JSON object, found {type(found[key]).__name__}")
                rounds(found)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: not readable ({type(error).__name__}: {printable(error, 200)}); the new model's "
                            f"{FILE} will hold its content: repair it, or remove it") from None
    return found


def model_card(name: str, record: Record) -> str:
    """The card of the model `name`, whose `training.json` is `record`."""
    base, earlier = record["base"], rounds(record["base"])
    data = [(literal(source["file"]), use, source["documents"], source["tokens"], source["target_tokens"],
             f"{source['weight']:.4g}" if "weight" in source else "-", f"`{source['sha256'][:12]}`")
            for use, sources in record["data"].items() for source in sources]
    losses = [(literal(source), found["target_tokens"], _loss(found["before"]), _loss(found["after"]), found["step"],
               _perplexity(found["before"]), _perplexity(found["after"]), _loss(found.get("forgetting"), sign="+"))
              for source, found in record["losses"].items()]
    settings = [(f"{section}.{key}", literal(json.dumps(value), 200))
                for section, keys in tomllib.loads(record["recipe"]).items() for key, value in keys.items()
                if SHOWN.fullmatch(f"{section}.{key}")]
    history = [(change["from_step"], change["key"], *(f"`{json.dumps(change[when])}`" for when in ("was", "is")))
               for change in record.get("history", []) if SHOWN.fullmatch(change["key"])]
    sections = ["\n".join(["## Earlier rounds, the last one first\n", *earlier, "\n"]) if len(earlier) > 1 else "",
                _section("Data", "file|use|documents|tokens|trained tokens|passes per epoch|sha256 begins", data),
                _section("Held-out losses\n\nIn nats per token; forgetting is how far the loss rose above the base "
                         "model's.", "held-out data|tokens|loss before|loss after|at step|perplexity before|"
                         "perplexity after|forgetting", losses),
                _section("Settings", "key|value", settings),
                _section("Settings changed during training", "from step|key|was|is", history)]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        base_model=f"base_model: {json.dumps(printable(base['name']), ensure_ascii=False)}\n" if base else "",
        title=re.sub(r"([!-,/:-@[-`{-~])", r"\\\1", printable(name)), summary=_summary(record),
        sections="".join(sections), name=shlex.quote(printable(name)))


def literal(name: object, limit: int = 80) -> str:
    """A foreign name in Markdown: as code, in which only a backtick means something."""
    return f"`{printable(name, limit).replace('`', chr(39)) or ' '}`"


def rounds(base: Record | None) -> list[str]:
    """A line for each model before this one, the last first, as far back as minisft's own records reach."""
    lines = []
    while base and "minisft" in (before := base.get("training", {})):
        files = [literal(source["file"]) for use in ("train", "replay") for source in before["data"][use]]
        more = f" and {len(files) - 20} more" if len(files) > 20 else ""
        lines.append(f"- {literal(base['name'])}: {before['steps']:,} steps, {before['target_tokens']:,} trained "
                     f"tokens, on {', '.join(files[:20])}{more}")
        base = before["base"]
    return [*lines, f"- {literal(base['name'])}: the first base model" if base else "- random weights"]


def _summary(record: Record) -> str:
    base, skipped = record["base"], record.get("skipped_steps", 0)
    lost = record["steps"] - record.get("logged_steps", record["steps"])
    origin = f"{literal(base['name'])}, fine-tuned on conversations" if base else "Random weights, trained"
    code = f"minisft {record['minisft']}" + (f" at commit {record['commit']}" if record["commit"] else "")
    return (f"{origin} with {code} and torch {record['torch']}, in {record['ranks']} "
            f"process{'es' * (record['ranks'] > 1)}: {record['steps']:,} of {record['total_steps']:,} steps"
            + (f" (ended early: {literal(record['stopped'], 200)})" if "stopped" in record else "")
            + (f" ({skipped:,} skipped: not finite)" if skipped else "")
            + (f" (the log of {lost:,} is lost; none of these figures include them)" if lost else "")
            + f", {record['tokens']:,} tokens seen, {record['target_tokens']:,} of them trained, in "
            f"{record['seconds']:,.0f} seconds. `training.json` has the whole recipe. All figures here are the run's "
            "own.")


def _loss(loss: float | None, *, sign: str = "") -> str:
    return "-" if loss is None else f"{loss:{sign}.4f}"


def _perplexity(loss: float | None) -> str:
    return "-" if loss is None or loss > 700 else f"{math.exp(loss):,.2f}"


def _section(title: str, head: str, rows: Sequence[tuple[str | int, ...]]) -> str:
    """A section with a table; empty without rows."""
    names = head.split("|")
    table = [names, ["---"] * len(names), *([f"{cell:,}" if isinstance(cell, int) else cell.replace("|", "\\|")
                                             for cell in row] for row in rows)]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n" if rows else ""
