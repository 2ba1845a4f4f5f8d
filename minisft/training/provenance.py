"""Where a trained model came from, written into its folder as `training.json`.

    minisft, commit, torch, ranks      the code that trained it, and on how many processes
    recipe, seed                       the effective configuration, as TOML
    data                               every file: its sha256, documents, tokens, trained tokens, passes in an epoch
    steps, tokens, ..., losses         what came of it, by the run's own log; logged_steps if that lacks some
    history                            settings changed when the run was resumed: from_step, key, was, is
    base                               the model it began with: path, config, and the `training.json` found there

Llama-3-Instruct was trained in six rounds, each from the model of the round before (Llama Team 2024, "The Llama 3 Herd
of Models", section 4.1.6). Here the folder that one run writes is what the next one reads, and a folder's record holds
those of all rounds before it: record["base"]["training"]["base"]["training"] and so on.
"""

import json
from pathlib import Path
from typing import Any

import torch

import minisft
from minisft.errors import UserError, printable
from minisft.files import read_small
from minisft.training.card import rounds
from minisft.training.environment import SOURCE, commit

FILE = "training.json"
FIGURES = ("name", "template", "sha256", "tokens", "target_tokens", "weight")  # of a source, from the data report

Record = dict[str, Any]


def beginnings(base: str) -> Record:
    """What has to be known before a run begins: the code, and the model in folder `base` (empty: random weights).

    Raises UserError where the files there are not JSON objects: hours later would be too late to find that out.
    """
    return {"minisft": minisft.__version__, "commit": commit(SOURCE),
            "torch": torch.__version__, "base": _base(Path(base)) if base else None}


def training_record(begun: Record, *, recipe: str, seed: int, ranks: int, data: dict[str, list[dict[str, Any]]],
                    log: list[dict[str, Any]], step: int, total_steps: int, history: list[Record]) -> Record:
    """The content of `training.json` after `step`. `data`: use -> sources as the data report has them; `log`: the run's
    records; `history`: what `resume.history` found."""
    base = begun["base"]
    trained = [record for record in log if record["kind"] == "train"]
    sums = {name: sum(record[name] for record in trained) for name in ("tokens", "target_tokens", "seconds")}
    return {**{key: value for key, value in begun.items() if key != "base"}, "ranks": ranks, "recipe": recipe,
            "seed": seed, "data": {use: [_source(source) for source in sources] for use, sources in data.items()},
            "steps": step, **({"logged_steps": len(trained)} if len(trained) < step else {}),
            "skipped_steps": sum(record.get("skipped") is True for record in trained), "total_steps": total_steps,
            "history": history, **sums,
            "final_loss": trained[-1]["loss"] if trained else None, "losses": _losses(log), "base": base}


def model_name(folder: Path) -> str:
    """What a model folder is called: runs/mine/final -> mine, runs/mine/exports/step-000100 -> mine-step-000100."""
    folder = folder.absolute()
    if folder.name == "final":
        return folder.parent.name or folder.name
    return f"{folder.parents[1].name}-{folder.name}" if folder.parent.name == "exports" else folder.name


def _source(source: dict[str, Any]) -> Record:
    return {"file": Path(source["path"]).name, "documents": source["kept"],
            **{name: source[name] for name in FIGURES if name in source}}


def _losses(log: list[dict[str, Any]]) -> dict[str, Record]:
    """Name -> the first and the last held-out loss; the first is the base model's where the log begins at step 0."""
    losses: dict[str, Record] = {}
    for record in log:
        if record["kind"] == "eval":
            found = losses.setdefault(record["name"], {"target_tokens": record["target_tokens"], "before": None})
            if record["step"] == 0:
                found["before"] = record["loss"]
            found |= {"step": record["step"], "after": record["loss"]}
            if "forgetting" in record:
                found["forgetting"] = record["forgetting"]
    return losses


def _base(folder: Path) -> Record:
    found: Record = {"name": model_name(folder), "path": str(folder)}
    for key, name in (("config", "config.json"), ("config", "params.json"), ("training", FILE)):
        if (file := folder / name).exists():
            found.setdefault(key, _object(file))
    try:
        rounds(found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / FILE}: not as minisft writes it ({type(error).__name__}: {printable(error, 200)}); "
                        "mend it, or remove it") from None
    return found


def _object(file: Path) -> Record:
    try:
        content = json.loads(read_small(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON file ({printable(error, 200)}); it is kept in the new model's "
                        f"{FILE}: mend it, or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}; mend it, or remove it")
    return content
