"""The model card: `README.md` of a model folder, as model hubs show it (Mitchell et al. 2019, "Model Cards for Model
Reporting").

All of it is said by the run itself, in `training.json`; what a run cannot know (language, licence, intended use) is
left to its author. Files are named without their folders, which are nobody's business. Names of files and of earlier
models may be somebody else's: as code they are only themselves, whatever Markdown or HTML they spell.
"""

import json
import math
import re
import shlex
import tomllib
from collections.abc import Sequence
from typing import Any

from minisft.errors import printable

SETTINGS = ("batch", "train", "optim", "lora")  # sections of the recipe that the card shows, and these of data
DATA_SETTINGS = ("template", "train_on", "seq_len", "overlong", "dedup", "replay_ratio")


def model_card(name: str, record: dict[str, Any]) -> str:
    """The card of the model `name` that `record` (`training.json`) tells of."""
    title = re.sub(r"([!-,/:-@[-`{-~])", r"\\\1", printable(name))
    parts = (_front_matter(record), f"# {title}\n\n{_summary(record)}", _rounds(record), _data(record),
             _heldout(record), _settings(record), _history(record), _use(name))
    return "\n\n".join(part for part in parts if part) + "\n"


def literal(name: object, limit: int = 80) -> str:
    """A foreign name in Markdown: as code, in which only a backtick means something."""
    return f"`{printable(name, limit).replace('`', chr(39)) or ' '}`"


def _front_matter(record: dict[str, Any]) -> str:
    base = record["base"]
    named = [f"base_model: {json.dumps(printable(base['name']), ensure_ascii=False)}"] if base else []
    return "\n".join(["---", *named, "library_name: transformers", "pipeline_tag: text-generation",
                      "tags:", "- minisft", "- sft", "---"])


def _summary(record: dict[str, Any]) -> str:
    base = record["base"]
    origin = f"{literal(base['name'])}, fine-tuned on conversations" if base else "Random weights, trained"
    code = f"minisft {record['minisft']}" + (f" at commit {record['commit']}" if record["commit"] else "")
    processes = f"{record['ranks']} process{'es' * (record['ranks'] > 1)}"
    return (f"{origin} with {code} and torch {record['torch']}, in {processes}: {record['steps']:,} of "
            f"{record['total_steps']:,} steps{_exceptions(record)}, {record['tokens']:,} tokens seen, "
            f"{record['target_tokens']:,} of them trained, in {record['seconds']:,.0f} seconds. `training.json` has "
            "the whole recipe. All figures here are the run's own.")


def _exceptions(record: dict[str, Any]) -> str:
    skipped, lost = record.get("skipped_steps", 0), record["steps"] - record.get("logged_steps", record["steps"])
    return (f" ({skipped:,} skipped: not finite)" if skipped else "") + (
        f" (the log of {lost:,} is lost; they are in none of these figures)" if lost else "")


def rounds(base: dict[str, Any] | None) -> list[str]:
    """A line for each model before this one, the last first, as far back as minisft's own records tell."""
    lines = []
    while base and "minisft" in (before := base.get("training", {})):
        files = [literal(source["file"]) for use in ("train", "replay") for source in before["data"][use]]
        more = f" and {len(files) - 20} more" if len(files) > 20 else ""
        lines.append(f"- {literal(base['name'])}: {before['steps']:,} steps, {before['target_tokens']:,} trained "
                     f"tokens, on {', '.join(files[:20])}{more}")
        base = before["base"]
    return [*lines, f"- {literal(base['name'])}: the first base model" if base else "- random weights"]


def _rounds(record: dict[str, Any]) -> str:
    lines = rounds(record["base"])
    return "## The rounds before, the last one first\n\n" + "\n".join(lines) if len(lines) > 1 else ""


def _data(record: dict[str, Any]) -> str:
    rows = [(literal(source["file"]), use, source["documents"], source["tokens"], source["target_tokens"],
             f"{source['weight']:.4g}" if "weight" in source else "-", f"`{source['sha256'][:12]}`")
            for use, sources in record["data"].items() for source in sources]
    head = ("file", "use", "documents", "tokens", "trained tokens", "passes in an epoch", "sha256 begins")
    return "## Data\n\n" + _table(head, rows)


def _heldout(record: dict[str, Any]) -> str:
    if not record["losses"]:
        return ""
    rows = [(literal(name), found["target_tokens"], *map(_loss, (found["before"], found["after"])), found["step"],
             *map(_perplexity, (found["before"], found["after"])),
             _loss(found.get("forgetting"), sign="+")) for name, found in record["losses"].items()]
    head = ("held-out data", "tokens", "loss before", "loss after", "at step", "perplexity before", "perplexity after",
            "forgetting")
    return ("## Held-out losses\n\nIn nats a token; forgetting is how far general text has risen above the base "
            "model's loss.\n\n" + _table(head, rows))


def _settings(record: dict[str, Any]) -> str:
    recipe = tomllib.loads(record["recipe"])
    rows = [(f"{section}.{key}", literal(json.dumps(value), 200)) for section in ("data", *SETTINGS)
            for key, value in recipe.get(section, {}).items() if section != "data" or key in DATA_SETTINGS]
    return "## Settings\n\n" + _table(("key", "value"), rows)


def _history(record: dict[str, Any]) -> str:
    rows = [(change["from_step"], change["key"], *(f"`{json.dumps(change[when])}`" for when in ("was", "is")))
            for change in record.get("history", [])
            if change["key"].partition(".")[0] in SETTINGS or change["key"].removeprefix("data.") in DATA_SETTINGS]
    return "## Settings changed on the way\n\n" + _table(("from step", "key", "was", "is"), rows) if rows else ""


def _use(name: str) -> str:
    return f"""## Use

`FOLDER` is the folder of this file.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "Hello!"}}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```

```
minisft chat FOLDER
vllm serve FOLDER --served-model-name {shlex.quote(printable(name))}
python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile model.gguf && llama-cli -m model.gguf
```"""


def _loss(loss: float | None, *, sign: str = "") -> str:
    return "-" if loss is None else f"{loss:{sign}.4f}"


def _perplexity(loss: float | None) -> str:
    return "-" if loss is None or loss > 700 else f"{math.exp(loss):,.2f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str | int, ...]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))
