"""The model card: `README.md` of a model folder, as model hubs show it (Mitchell et al. 2019, "Model Cards for Model
Reporting"). card.md is its template.

Everything in it comes from the run's own `training.json`; what a run cannot know (language, licence, intended use) is
left to its author. Files are named without their folders, which are private. Names of files and of earlier models may
come from others: as code they stand for themselves, whatever Markdown or HTML they spell.
"""

import json
import math
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from minisft.errors import printable

# The settings that the card shows.
SHOWN = re.compile(r"(batch|train|optim|lora)\..+|data\.(template|train_on|seq_len|overlong|dedup|replay_ratio)")
TEMPLATE = Path(__file__).with_name("card.md")


def model_card(name: str, record: dict[str, Any]) -> str:
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


def rounds(base: dict[str, Any] | None) -> list[str]:
    """A line for each model before this one, the last first, as far back as minisft's own records reach."""
    lines = []
    while base and "minisft" in (before := base.get("training", {})):
        files = [literal(source["file"]) for use in ("train", "replay") for source in before["data"][use]]
        more = f" and {len(files) - 20} more" if len(files) > 20 else ""
        lines.append(f"- {literal(base['name'])}: {before['steps']:,} steps, {before['target_tokens']:,} trained "
                     f"tokens, on {', '.join(files[:20])}{more}")
        base = before["base"]
    return [*lines, f"- {literal(base['name'])}: the first base model" if base else "- random weights"]


def _summary(record: dict[str, Any]) -> str:
    base, skipped = record["base"], record.get("skipped_steps", 0)
    lost = record["steps"] - record.get("logged_steps", record["steps"])
    origin = f"{literal(base['name'])}, fine-tuned on conversations" if base else "Random weights, trained"
    code = f"minisft {record['minisft']}" + (f" at commit {record['commit']}" if record["commit"] else "")
    return (f"{origin} with {code} and torch {record['torch']}, in {record['ranks']} "
            f"process{'es' * (record['ranks'] > 1)}: {record['steps']:,} of {record['total_steps']:,} steps"
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
