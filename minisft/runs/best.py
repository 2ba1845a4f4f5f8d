"""Which step was the best by a held-out loss, and when more steps do not help.

    loss on heldout-x at step 0: 3.14    10: 1.20    20: 1.02    30: 1.05    40: 1.04
    checkpoint.keep_best = "heldout-x"  ->  best/step-000020/, a Hugging Face folder
    eval.stop_on = ["heldout-x"], eval.patience = 2  ->  the run ends after step 40

Both follow from the eval records of the log alone, so a resumed run decides as an uninterrupted one does. A model is
deleted only when neither the run, nor any of its checkpoints if it was resumed from there, would call it the best.
"""

import math
import re
from pathlib import Path
from typing import Any

from minisft.config import FORGETTING, EvalConfig
from minisft.files import delete
from minisft.training.checkpoint import saved_checkpoints, set_aside, step_of

Records = list[dict[str, Any]]


def lowest(evals: Records, name: str) -> dict[str, Any] | None:
    """The record of the lowest loss on `name`, the first of equal ones; None if no loss on it is finite."""
    return min((record for record in evals if record["name"] == name and record["loss"] is not None),
               key=lambda record: float(record["loss"]), default=None)


def stop_reason(evals: Records, config: EvalConfig) -> str:
    """Why a run ends after the last evaluation in `evals`; "" if it goes on."""
    last = max((record["step"] for record in evals), default=0)
    for name in config.stop_on:
        if name == FORGETTING:
            for record in evals:
                if record["step"] == last and record.get("forgetting", 0) > config.forgetting_bound:
                    return (f"the loss on {record['name']} is {record['forgetting']:.4f} nats a token above the base "
                            f"model's (eval.forgetting_bound = {config.forgetting_bound:g})")
            continue
        best = lowest(evals, name) or {"step": -1, "loss": math.inf}
        since = {record["step"] for record in evals if record["name"] == name and record["step"] > best["step"]}
        if len(since) >= config.patience:
            return (f"the last {config.patience} losses on {name} are not below {best['loss']:.4f}, that after step "
                    f"{best['step']} (eval.patience)")
    return ""


def model_folder(run: Path, kind: str, step: int) -> Path:
    """Where a model on the way is, of `kind` "exports" or "best"."""
    return run / kind / f"step-{step:06}"


def set_aside_later(run: Path, step: int) -> None:
    """Rename the models on the way after `step`, because those steps are taken again, perhaps otherwise."""
    set_aside([folder for kind in ("exports", "best") for folder in run.glob(f"{kind}/step-*")
               if (found := re.fullmatch(r"step-(\d+)(-adapter)?", folder.name)) and int(found[1]) > step])


def delete_worse(run: Path, evals: Records, name: str, *, resumable: bool) -> None:
    """Delete the models in best/ that are no longer the best, unless the run is `resumable` from a checkpoint at which
    they were."""
    ends = [step_of(checkpoint) for checkpoint in saved_checkpoints(run / "checkpoints")] if resumable else []
    found = [lowest([record for record in evals if record["step"] <= end], name) for end in (math.inf, *ends)]
    kept = {model_folder(run, "best", record["step"]).name for record in found if record}
    for folder in run.glob("best/step-*"):
        if folder.name.removesuffix("-adapter") not in kept:
            delete(folder)
